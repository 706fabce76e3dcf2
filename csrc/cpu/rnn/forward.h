// The forward pass of a layer: one fused step, repeated over time.
//
// A worker owns some batch rows and some panels of hidden units of one direction:
//
//   for each step, panel and kMC rows
//     gate_gemm   preacts = x W_ih + h W_hh    (gate_weights.h)
//     epilogue    preacts + bias -> states, while they are in the L1    (epilogue.h)
//
// Threads that split the rows never meet; threads that split the units meet after each step.
#pragma once
#include <atomic>

#include "../../core/saved_layout.h"
#include "epilogue.h"
#include "forward_resets.h"
#include "normalized_rows.h"
#include "projection_forward.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

// Where the weights behind a header are.
inline Arena prepacked_weights(const PrepackedHeader* header) {
  return Arena(header ? const_cast<PrepackedHeader*>(header + 1) : nullptr);
}

template <class Cell, class T>
class ForwardDirection {
  using S = Acc<T>;
  using V = Vec<S>;
  using StepOperands = RNNKERN_ISA::StepOperands<Cell, T>;
  using Projection = std::conditional_t<std::is_same_v<T, S>, ForwardProjection<S>, NoProjection>;
  using Epilogue = RNNKERN_ISA::Epilogue<Cell, T>;
  using Resets = ForwardResets<Cell, T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kCValues = Cell::kStates - 1;  // states besides h
  static constexpr bool kHasC = kCValues > 0, kKeepsFp32H = Epilogue::kKeepsFp32H;
  static constexpr bool kRecurs = Products<Cell>::kRecurs;
  static_assert(kUnitBlock % kLanes == 0);

 public:
  static constexpr bool kProjects = Cell::kProjects && Projection::kExists;

  // What the workers of a direction share.
  struct Shared {
    PackedGateWeights<Cell, T> weights;
    Projection projection;
    S* zeros;                      // the default initial state
    S* h_fp32;                     // (B, H)
    std::atomic<int64_t> next{0};  // first block of batch rows that no worker has taken

    // Of `packed` are the weights, of `arena` what a call needs besides.
    Shared(const ForwardParams<T>& p, const Plan& plan, Arena& packed, Arena& arena, int direction)
        : weights(p, plan, direction, packed, arena),
          projection(p, plan, direction, packed, arena) {
      if (direction >= p.directions) return;
      zeros = arena.alloc<S>(p.hidden_size);
      h_fp32 = kKeepsFp32H ? arena.alloc<S>(p.sequence.batch * p.hidden_size) : nullptr;
    }
  };

  // Batch rows that go through time together, at most.
  static int64_t block_rows(const ForwardParams<T>& p, const Plan& plan) {
    return p.sequence.largest_block(plan.row_blocks(p.sequence.batch));
  }

  // Elements of a worker's buffer: for x W_ih or, with int8 weights, for the rows of a step.
  static int64_t chunk_size(const ForwardParams<T>& p, const Plan& plan, const Shared& shared) {
    const int64_t rows = block_rows(p, plan);
    const PackedLayout<PackedElem<T>> panels = gate_layout<Cell, T>(p.hidden_size);
    if (plan.fused_input)
      return rows * shared.weights.quantized_lanes() + NormalizedRows<Cell, T>::size(rows, panels);
    return plan.input_chunk * rows * panels.offset(panels.count());
  }

  // Elements of a worker's buffer for what a step reads in the place of the states before it.
  static int64_t states_size(const ForwardParams<T>& p, const Plan& plan) {
    const int64_t masked = Cell::kMasksHidden ? p.hidden_size : 0;
    return block_rows(p, plan) * (Resets::width(p) + masked);
  }

  ForwardDirection(const ForwardParams<T>& p, const Plan& plan, int direction, Shared& shared,
                   S* chunk, S* states)
      : p_(p),
        seq_(p.sequence),
        plan_(plan),
        d_(direction),
        shared_(shared),
        chunk_(chunk),
        states_(states),
        panels_(gate_layout<Cell, T>(p.hidden_size)),
        epilogue_{shared.weights, panels_, p.hidden_size},
        resets_(p, shared.zeros, states, panels_) {}

  void run(Team team) {
    const int64_t count = panels_.count(), begin = team.begin(count), end = team.end(count);
    if (!p_.prepacked) {
      shared_.weights.pack(begin, end);
      if constexpr (kProjects)
        if (projects()) shared_.projection.pack(team);
    }
    if constexpr (kKeepsFp32H) load_h_fp32(team);
    if (team.rank == 0)
      for (int64_t u = 0; u < p_.hidden_size; ++u) shared_.zeros[u] = 0;
    team.sync();
    if (plan_.split_units) return time_loop({0, seq_.batch, begin, end}, team);
    const int64_t blocks = plan_.row_blocks(seq_.batch);
    for (int64_t i; (i = shared_.next++) < blocks;)
      time_loop({seq_.block_begin(i, blocks), seq_.block_begin(i + 1, blocks), 0, count},
                Team{0, 1, nullptr});
  }

 private:
  int64_t time(int64_t s) const { return d_ ? seq_.steps - 1 - s : s; }
  bool projects() const { return kProjects && p_.proj_size; }
  StridedRows<T> h_rows(int64_t t, int64_t b) const {
    return {p_.y.at(seq_, t) + b * p_.y.b_stride + d_ * p_.h_size(), p_.y.b_stride};
  }

  void time_loop(const WorkRange& range, Team team) {
    int64_t before = range.b0;  // rows that have a previous step
    for (int64_t s = 0; s < seq_.steps; ++s) {
      if (!plan_.fused_input && s % plan_.input_chunk == 0) input_chunk(s, range);
      const int64_t active = min(seq_.active(time(s)), range.b1);
      const int64_t carried = min(before, active);
      if (range.b0 < carried) fused_step(s, range, range.b0, carried, true);
      if (carried < active) fused_step(s, range, carried, active, false);
      if constexpr (kProjects)
        if (projects()) {
          team.sync();
          shared_.projection.run(range.b0, active, h_rows(time(s), range.b0), team);
        }
      before = max(active, range.b0);
      if (kRecurs || p_.resets.data) team.sync();  // others read this worker's h
    }
    finish(range, team);
  }

  // x W_ih for a chunk of steps: [panel][step][batch row][vector].
  void input_chunk(int64_t s0, const WorkRange& range) {
    const int64_t s1 = min(s0 + plan_.input_chunk, seq_.steps);
    const int64_t batch = range.b1 - range.b0;
    for (int64_t panel = range.p0; panel < range.p1; ++panel) {
      const int64_t width = panels_.ldb(panel);
      bool first = true;
      const auto tile = [&](StridedRows<const T> x, StridedRows<S> out, int rows) {
        shared_.weights.input_gemm(panel, rows, x, first, panel + 1 < range.p1 ? panel + 1 : -1,
                                   out);
        first = false;
      };
      for (int64_t s = s0, stop; s < s1; s = stop) {  // steps with the same batch rows
        const int64_t active = seq_.active(time(s)), rows = min(active, range.b1) - range.b0;
        for (stop = s + 1; stop < s1 && seq_.active(time(stop)) == active;) ++stop;
        const T* const x = p_.x.at(seq_, time(s)) + range.b0 * p_.x.b_stride;
        const int64_t steps = stop - s;
        const int64_t x_step = steps > 1 ? p_.x.at(seq_, time(s + 1)) - p_.x.at(seq_, time(s)) : 0;
        if (rows < steps) {  // few rows: tiles along time
          for (int64_t b = 0; b < rows; ++b)
            for_mc_blocks(steps, [&](int64_t i, int n) {
              tile({x + b * p_.x.b_stride + i * x_step, x_step},
                   {chunk_at(s + i, range.b0 + b, panel, range), batch * width}, n);
            });
        } else {
          for (int64_t i = 0; i < steps; ++i)
            for_mc_blocks(rows, [&](int64_t b, int n) {
              tile({x + b * p_.x.b_stride + i * x_step, p_.x.b_stride},
                   {chunk_at(s + i, range.b0 + b, panel, range), width}, n);
            });
        }
      }
    }
  }

  S* chunk_at(int64_t s, int64_t b, int64_t panel, const WorkRange& range) const {
    const int64_t batch = range.b1 - range.b0, rows = plan_.input_chunk * batch;
    const int64_t row = s % plan_.input_chunk * batch + b - range.b0;
    return chunk_ + (panels_.offset(panel) - panels_.offset(range.p0)) * rows +
           row * panels_.ldb(panel);
  }

  StepOperands step_operands(int64_t s, int64_t r0, bool carried) const {
    const int64_t H = p_.hidden_size, R = p_.h_size(), t = time(s);
    const int64_t state_row = d_ * seq_.batch + r0, C = kCValues * H;
    StepOperands step{};
    step.set_masks(p_, seq_, d_, t, r0);
    step.set_sums({p_.x.at(seq_, t) + r0 * p_.x.b_stride, p_.x.b_stride}, d_, H);
    step.h_next = h_rows(t, r0);
    if constexpr (kProjects)
      if (projects()) step.h_next = shared_.projection.m(r0);
    if constexpr (kKeepsFp32H) {
      step.h_fp32_next = {shared_.h_fp32 + r0 * H, H};
      step.h_fp32_prev = {step.h_fp32_next.data, H};
    }
    const SavedStep saved(seq_, d_, t, H);
    if (Cell::kSaved) step.saved = saved.of(p_.saved, r0, Cell::kSaved);
    const StridedRows<S> c_n{p_.c_n + state_row * C, C};
    if (kHasC) step.c_next = {saved.of(p_.c_states, r0, kCValues), c_n, H};
    if (!carried) {
      const T* const zeros = reinterpret_cast<const T*>(shared_.zeros);
      step.h_prev =
          p_.h0 ? StridedRows<const T>{p_.h0 + state_row * R, R} : StridedRows<const T>{zeros, 0};
      if (p_.c0)
        step.c_prev = {{}, {p_.c0 + state_row * C, C}, H};
      else
        step.c_prev = {{}, {shared_.zeros, 0}, 0};
      return step;
    }
    const int64_t previous = time(s - 1);
    const StridedRows<T> h_prev = h_rows(previous, r0);
    step.h_prev = {h_prev.data, h_prev.stride};
    if (kHasC)
      step.c_prev = {SavedStep(seq_, d_, previous, H).of<const S>(p_.c_states, r0, kCValues),
                     {c_n.data, c_n.stride},
                     H};
    return step;
  }

  // One step of batch rows [r0, r1). `carried`: they have a previous step.
  void fused_step(int64_t s, const WorkRange& range, int64_t r0, int64_t r1, bool carried) {
    const StepOperands step = p_.resets.data
                                  ? resets_(step_operands(s, r0, carried), time(s), range, r0, r1)
                                  : step_operands(s, r0, carried);
    const StridedRows<const T> x{p_.x.at(seq_, time(s)) + r0 * p_.x.b_stride, p_.x.b_stride};
    const int64_t quantized = shared_.weights.quantized_lanes();
    StridedRows<const T> h = step.h_prev;
    if constexpr (Cell::kMasksHidden) {
      const int64_t H = p_.hidden_size;
      T* const masked = reinterpret_cast<T*>(states_ + (r1 - r0) * Resets::width(p_));
      step.mask_hidden(h, 0, r1 - r0, H, masked);
      h = {masked, H};
    }
    if (quantized) shared_.weights.quantize_rows(r1 - r0, x, h, chunk_);
    if constexpr (RowNorm<Cell>::kAny) return normalized_step(step, h, r1 - r0, quantized);
    for (int64_t i = range.p0; i < range.p1; ++i) {
      const int64_t panel = serpentine(i, s, range), next = next_serpentine(i, s, range);
      StridedRows<const S> input_preacts{};
      if (!plan_.fused_input) input_preacts = {chunk_at(s, r0, panel, range), panels_.ldb(panel)};
      for_mc_blocks(r1 - r0, [&](int64_t r, int n) {
        if constexpr (!kRecurs)  // which the plan never fuses, but for int8
          if (!quantized) return epilogue_(panel, r, n, step, input_preacts[r]);
        alignas(64) S preacts[kMC * kMaxNR * kLanes];
        if (quantized)
          shared_.weights.gate_gemm_int8(panel, n, chunk_ + r * quantized, preacts);
        else if constexpr (kRecurs)
          shared_.weights.gate_gemm(panel, n, {x[r], x.stride}, {h[r], h.stride},
                                    {input_preacts[r], input_preacts.stride}, r == 0, next,
                                    preacts);
        epilogue_(panel, r, n, step, preacts);
      });
    }
  }

  // The same where a step needs whole rows.
  void normalized_step(StepOperands step, StridedRows<const T> h, int64_t rows, int64_t quantized) {
    const int64_t panels = panels_.count();
    NormalizedRows<Cell, T> whole(shared_.weights, panels_, chunk_ + rows * quantized, rows, step);
    for_mc_blocks(rows, [&](int64_t r, int n) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        S* const preacts = whole.sums(panel, n);
        if (quantized)
          shared_.weights.gate_gemm_int8(panel, n, chunk_ + r * quantized, preacts);
        else
          shared_.weights.gate_gemm(panel, n, {}, {h[r], h.stride}, {}, r == 0,
                                    panel + 1 < panels ? panel + 1 : -1, preacts);
      }
      whole.standardize(r, n);
      for (int64_t panel = 0; panel < panels; ++panel)
        epilogue_(panel, r, n, step, whole.sums(panel, n));
      whole.output(step, r, n);
    });
  }

  // The worker's share of the initial h, unrounded.
  void load_h_fp32(Team team) const {
    const int64_t H = p_.hidden_size, first = d_ * seq_.batch;
    for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b)
      for (int64_t u = 0; u < H; ++u)
        shared_.h_fp32[b * H + u] = p_.h0 ? to_acc(p_.h0[(first + b) * H + u]) : S(0);
  }

  // The final states: of each row, those after its last step.
  void finish(const WorkRange& range, Team team) const {
    const int64_t H = p_.hidden_size, R = p_.h_size();
    const int64_t u0 = min(panels_.first_unit(range.p0), H);
    const int64_t u1 = min(panels_.first_unit(range.p1), H);
    const int64_t h0 = projects() ? team.begin(R) : u0, h1 = projects() ? team.end(R) : u1;
    int64_t ended = 0;
    for (int64_t t = seq_.steps - 1; t >= 0; --t) {
      const int64_t active = seq_.active(t), last = d_ ? 0 : t;
      const SavedStep saved(seq_, d_, last, H);
      for (int64_t b = max(ended, range.b0); b < min(active, range.b1); ++b) {
        const int64_t state = d_ * seq_.batch + b;
        std::memcpy(p_.h_n + state * R + h0, h_rows(last, b).data + h0, (h1 - h0) * sizeof(T));
        if (kHasC && p_.c_states)
          for (int64_t u = u0; u < u1; u += kLanes) {
            const SavedValues<S> c = saved.of(p_.c_states, b, kCValues);
            for (int k = 0; k < kCValues; ++k)
              std::memcpy(p_.c_n + (state * kCValues + k) * H + u,
                          c.of(u).data + k * c.value_stride(u),
                          min<int64_t>(u1 - u, kLanes) * sizeof(S));
          }
      }
      ended = active;
      if (ended >= seq_.batch) break;
    }
  }

  const ForwardParams<T>& p_;
  const Sequence seq_;
  const Plan& plan_;
  const int d_;
  Shared& shared_;
  S *const chunk_, *const states_;
  const PackedLayout<PackedElem<T>> panels_;
  const Epilogue epilogue_;
  const Resets resets_;
};

// A call of the forward pass: its directions and the threads that run them.
template <class Cell, class T>
class ForwardCall {
  using S = Acc<T>;
  using Direction = ForwardDirection<Cell, T>;

 public:
  ForwardCall(const ForwardParams<T>& p, const Plan& plan, Arena arena, size_t* used = nullptr)
      : p_(p),
        plan_(plan),
        prepacked_(prepacked_weights(p.prepacked)),
        shared_{{p, plan, p.prepacked ? prepacked_ : arena, arena, 0},
                {p, plan, p.prepacked ? prepacked_ : arena, arena, 1}} {
    chunk_size_ = Direction::chunk_size(p, plan, shared_[0]) + 16;
    chunks_ = arena.alloc<S>(chunk_size_ * plan.threads);
    states_size_ = Direction::states_size(p, plan);
    states_ = arena.alloc<S>(states_size_ * plan.threads);
    if (used) *used = arena.used();
  }

  void run(Team team) {
    const int worker = team.rank;
    if (p_.directions == 2 && team.size % 2 == 0) {
      direction(team.rank % 2, worker, team.half());
    } else {
      for (int d = 0; d < p_.directions; ++d) direction(d, worker, team);
    }
  }

 private:
  void direction(int d, int worker, Team team) {
    Direction(p_, plan_, d, shared_[d], chunks_ + chunk_size_ * worker,
              states_ + states_size_ * worker)
        .run(team);
  }

  const ForwardParams<T>& p_;
  const Plan& plan_;
  Arena prepacked_;
  typename Direction::Shared shared_[kMaxDirections];
  S* chunks_;  // x W_ih ahead of the steps, one buffer per thread
  int64_t chunk_size_;
  S* states_;  // what a step reads in the place of the states before it, likewise
  int64_t states_size_;
};

template <class Cell, class T>
void run_forward(const ForwardParams<T>& p, const Plan& plan, const ParallelFor& parallel,
                 Workspace& workspace) {
  run_on_team<ForwardCall<Cell, T>>(p, plan, parallel, workspace);
}

}  // namespace rnnkern::RNNKERN_ISA
