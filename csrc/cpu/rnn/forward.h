// The forward pass of a layer: a fused step, walked over time.
//
// A worker owns some batch rows and some panels of hidden units of one direction. For each step,
// panel by panel, the register tile adds up bias, x W_ih and h W_hh for a few rows, and the cell
// turns these sums into states while they are in the first-level cache.
#pragma once
#include <atomic>

#include "../../core/saved_layout.h"
#include "../simd/math.h"
#include "gate_weights.h"
#include "projection_forward.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

// Where the states of a direction live, for a step and the rows from r0 on.
template <class T>
struct StepOperands {
  StridedRows<const T> h_prev;
  StridedRows<const Acc<T>> h_fp32_prev;  // of h, what the cell itself takes up
  StridedRows<T> h_next;
  StridedRows<Acc<T>> h_fp32_next;
  CStates<const Acc<T>> c_prev;
  CStates<Acc<T>> c_next;
  SavedValues<T> saved;
};

template <class Cell, class T>
class ForwardDirection {
  using S = Acc<T>;
  using V = Vec<S>;
  using Projection = std::conditional_t<std::is_same_v<T, S>, ForwardProjection<S>, NoProjection>;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kHasC = Cell::kStates > 1;
  static constexpr bool kProjects = Cell::kProjects && Projection::kExists;
  // Whether h is carried on beside y, unrounded.
  static constexpr bool kKeepsFp32H = !Cell::kProjects && !std::is_same_v<T, S>;
  static_assert(kUnitBlock % kLanes == 0);

 public:
  // What the workers of a direction share.
  struct Shared {
    PackedGateWeights<Cell, T> weights;
    Projection projection;
    S* zeros;                      // an initial state
    S* h_fp32;                     // (B, H)
    std::atomic<int64_t> next{0};  // batch row that nobody has taken yet

    Shared(const ForwardParams<T>& p, const Plan& plan, Arena& arena, int direction)
        : weights(p, plan, direction, arena),
          projection(p, plan, direction, arena) {
      if (direction >= p.directions) return;
      zeros = arena.alloc<S>(p.hidden_size);
      h_fp32 = kKeepsFp32H ? arena.alloc<S>(p.sequence.batch * p.hidden_size) : nullptr;
    }
  };

  // Elements of a worker's buffer for x W_ih.
  static int64_t chunk_size(const ForwardParams<T>& p, const Plan& plan) {
    if (plan.fused_input) return 0;
    const PackedLayout<PackedElem<T>> panels = gate_layout<Cell, T>(p.hidden_size);
    return plan.input_chunk * min(plan.row_block, p.sequence.batch) * panels.offset(panels.count());
  }

  ForwardDirection(const ForwardParams<T>& p, const Plan& plan, int direction, Shared& shared,
                   S* chunk)
      : p_(p),
        seq_(p.sequence),
        plan_(plan),
        d_(direction),
        shared_(shared),
        chunk_(chunk),
        panels_(gate_layout<Cell, T>(p.hidden_size)) {}

  void run(Team team) {
    const int64_t count = panels_.count(), begin = team.begin(count), end = team.end(count);
    shared_.weights.pack(begin, end);
    if constexpr (kProjects)
      if (projects()) shared_.projection.pack(team);
    if constexpr (kKeepsFp32H) load_h_fp32(team);
    if (team.rank == 0)
      for (int64_t u = 0; u < p_.hidden_size; ++u) shared_.zeros[u] = 0;
    team.sync();
    if (plan_.split_units) return time_loop({0, seq_.batch, begin, end}, team);
    for (int64_t b; (b = shared_.next.fetch_add(plan_.row_block)) < seq_.batch;)
      time_loop({b, min(b + plan_.row_block, seq_.batch), 0, count}, Team{0, 1, nullptr});
  }

 private:
  int64_t time(int64_t s) const { return d_ ? seq_.steps - 1 - s : s; }
  bool projects() const { return kProjects && p_.proj_size; }
  StridedRows<T> h_rows(int64_t t, int64_t b) const {
    return {p_.y.at(seq_, t) + b * p_.y.b_stride + d_ * p_.h_size(), p_.y.b_stride};
  }

  void time_loop(const WorkRange& part, Team team) {
    int64_t before = part.b0;  // rows that have a previous step
    for (int64_t s = 0; s < seq_.steps; ++s) {
      if (!plan_.fused_input && s % plan_.input_chunk == 0) project(s, part);
      const int64_t active = min(seq_.active(time(s)), part.b1);
      const int64_t carried = min(before, active);
      if (part.b0 < carried) step(s, part, part.b0, carried, true);
      if (carried < active) step(s, part, carried, active, false);
      if constexpr (kProjects)
        if (projects()) {
          team.sync();
          shared_.projection.run(part.b0, active, h_rows(time(s), part.b0), team);
        }
      before = max(active, part.b0);
      team.sync();
    }
    finish(part, team);
  }

  // The input's part of the sums for a chunk of steps, [panel][step][batch row][vector].
  void project(int64_t s0, const WorkRange& part) {
    const int64_t s1 = min(s0 + plan_.input_chunk, seq_.steps);
    const int64_t batch = part.b1 - part.b0;
    for (int64_t panel = part.p0; panel < part.p1; ++panel) {
      const int64_t width = panels_.ldb(panel);
      bool first = true;
      const auto tile = [&](StridedRows<const T> x, StridedRows<S> out, int rows) {
        shared_.weights.input_gemm(panel, rows, x, first, panel + 1 < part.p1 ? panel + 1 : -1,
                                   out);
        first = false;
      };
      if (!seq_.offsets && batch < s1 - s0) {  // few rows: tiles along time
        for (int64_t b = part.b0; b < part.b1; ++b)
          for_mc_blocks(s1 - s0, [&](int64_t i, int n) {
            tile({p_.x.at(seq_, time(s0 + i)) + b * p_.x.b_stride,
                  d_ ? -p_.x.t_stride : p_.x.t_stride},
                 {chunk_at(s0 + i, b, panel, part), batch * width}, n);
          });
      } else {
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t t = time(s), active = min(seq_.active(t), part.b1) - part.b0;
          if (active > 0)
            for_mc_blocks(active, [&](int64_t i, int n) {
              tile({p_.x.at(seq_, t) + (part.b0 + i) * p_.x.b_stride, p_.x.b_stride},
                   {chunk_at(s, part.b0 + i, panel, part), width}, n);
            });
        }
      }
    }
  }

  S* chunk_at(int64_t s, int64_t b, int64_t panel, const WorkRange& part) const {
    const int64_t batch = part.b1 - part.b0, rows = plan_.input_chunk * batch;
    const int64_t row = s % plan_.input_chunk * batch + b - part.b0;
    return chunk_ + (panels_.offset(panel) - panels_.offset(part.p0)) * rows +
           row * panels_.ldb(panel);
  }

  StepOperands<T> step_operands(int64_t s, int64_t r0, bool carried) const {
    const int64_t H = p_.hidden_size, R = p_.h_size(), t = time(s);
    const int64_t state_row = d_ * seq_.batch + r0, state = state_row * H;
    StepOperands<T> rows{};
    rows.h_next = h_rows(t, r0);
    if constexpr (kProjects)
      if (projects()) rows.h_next = shared_.projection.m(r0);
    if constexpr (kKeepsFp32H) {
      rows.h_fp32_next = {shared_.h_fp32 + r0 * H, H};
      rows.h_fp32_prev = {rows.h_fp32_next.data, H};
    }
    const SavedStep kept(seq_, d_, t, H);
    if (Cell::kSaved) rows.saved = kept.of(p_.saved, r0, Cell::kSaved);
    if (kHasC) rows.c_next = {kept.of(p_.c_states, r0), {p_.c_n + state, H}};
    if (!carried) {
      const T* const zeros = reinterpret_cast<const T*>(shared_.zeros);
      rows.h_prev =
          p_.h0 ? StridedRows<const T>{p_.h0 + state_row * R, R} : StridedRows<const T>{zeros, 0};
      if (p_.c0)
        rows.c_prev.plain = {p_.c0 + state, H};
      else
        rows.c_prev.plain = {shared_.zeros, 0};
      return rows;
    }
    const int64_t previous = time(s - 1);
    const StridedRows<T> h_prev = h_rows(previous, r0);
    rows.h_prev = {h_prev.data, h_prev.stride};
    if (kHasC)
      rows.c_prev = {SavedStep(seq_, d_, previous, H).of<const S>(p_.c_states, r0),
                     {p_.c_n + state, H}};
    return rows;
  }

  // One step of batch rows [r0, r1), whose states before it are carried over, or initial.
  void step(int64_t s, const WorkRange& part, int64_t r0, int64_t r1, bool carried) {
    const StepOperands<T> rows = step_operands(s, r0, carried);
    const StridedRows<const T> x{p_.x.at(seq_, time(s)) + r0 * p_.x.b_stride, p_.x.b_stride};
    for (int64_t i = part.p0; i < part.p1; ++i) {
      const int64_t panel = serpentine(i, s, part), next = next_serpentine(i, s, part);
      StridedRows<const S> projected{};
      if (!plan_.fused_input) projected = {chunk_at(s, r0, panel, part), panels_.ldb(panel)};
      for_mc_blocks(r1 - r0, [&](int64_t r, int n) {
        alignas(64) S sums[kMC * kMaxNR * kLanes];
        shared_.weights.gate_gemm(panel, n, {x[r], x.stride}, {rows.h_prev[r], rows.h_prev.stride},
                                  {projected[r], projected.stride}, r == 0, next, sums);
        epilogue(panel, r, n, rows, sums);
      });
    }
  }

  // The cell, for n rows of a panel from row r on.
  void epilogue(int64_t panel, int64_t r, int n, const StepOperands<T>& rows, const S* sums) const {
    const int width = panels_.unit_vectors(panel), gate_stride = panels_.gate_stride(panel);
    const int64_t row = shared_.weights.preacts_ld(panel);
    for (int w = 0; w < width; ++w) {
      const int64_t unit = panels_.first_unit(panel) + w * kLanes;
      V bias[Cell::kPreacts];
      for (int k = 0; k < Cell::kPreacts; ++k)
        bias[k] = V::load(shared_.weights.bias(panel) + (k * width + w) * kLanes);
      UnitOperands of{};
      if (kHasC) of.c_prev = rows.c_prev.of(unit), of.c_next = rows.c_next.of(unit);
      if (rows.saved.data)
        of.saved = rows.saved.of(unit), of.saved_step = rows.saved.value_stride(unit);
      const auto over_rows = [&](int lanes) __attribute__((always_inline)) {
        const S* sum = sums + w * kLanes;
        int i = 0;
        for (; i + kEpilogueRows <= n; i += kEpilogueRows, sum += kEpilogueRows * row)
          epilogue_rows<kEpilogueRows>(rows, of, r + i, unit, lanes, sum, row, gate_stride, bias);
        for (; i < n; ++i, sum += row)
          epilogue_rows<1>(rows, of, r + i, unit, lanes, sum, row, gate_stride, bias);
      };
      const int64_t left = p_.hidden_size - unit;
      left >= kLanes ? over_rows(kLanes) : over_rows(int(left));
    }
  }

  // What stands in blocks of units, from a vector of them on.
  struct UnitOperands {
    StridedRows<const S> c_prev;
    StridedRows<S> c_next;
    StridedRows<T> saved;
    int64_t saved_step;
  };

  // The cell for a vector of units of a few rows.
  static constexpr int kEpilogueRows = 2;
  template <int kRows>
  RNNKERN_INLINE void epilogue_rows(const StepOperands<T>& rows, const UnitOperands& of, int64_t r,
                                    int64_t unit, int lanes, const S* sums, int64_t sums_row,
                                    int gate_stride, const V* bias) const {
    VecArray<S, kRows> sum[Cell::kPreacts], prev[2], next[2], keep[Cell::kSaved + 1];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      for (int k = 0; k < Cell::kPreacts; ++k)
        sum[k].v[i] = V::load(sums + i * sums_row + k * gate_stride) + bias[k];
      if constexpr (kKeepsFp32H)
        prev[0].v[i] = V::load(rows.h_fp32_prev[r + i] + unit, lanes);
      else if constexpr (!Cell::kProjects)
        prev[0].v[i] = V::load(rows.h_prev[r + i] + unit, lanes);
      if constexpr (kHasC) prev[1].v[i] = V::load(of.c_prev[r + i], lanes);
    }
    Cell::forward(sum, prev, next, keep);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      next[0].v[i].store(rows.h_next[r + i] + unit, lanes);
      if constexpr (kKeepsFp32H) next[0].v[i].store(rows.h_fp32_next[r + i] + unit, lanes);
      if constexpr (kHasC) next[1].v[i].store(of.c_next[r + i], lanes);
      if (Cell::kSaved > 0 && of.saved.data)
        for (int k = 0; k < Cell::kSaved; ++k)
          keep[k].v[i].store(of.saved[r + i] + k * of.saved_step, lanes);
    }
  }

  // The worker's share of what the cell takes up of the initial h.
  void load_h_fp32(Team team) const {
    const int64_t H = p_.hidden_size, first = d_ * seq_.batch;
    for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b)
      for (int64_t u = 0; u < H; ++u)
        shared_.h_fp32[b * H + u] = p_.h0 ? to_acc(p_.h0[(first + b) * H + u]) : S(0);
  }

  // The final states: of each row, those after its last step.
  void finish(const WorkRange& part, Team team) const {
    const int64_t H = p_.hidden_size, R = p_.h_size();
    const int64_t u0 = min(panels_.first_unit(part.p0), H);
    const int64_t u1 = min(panels_.first_unit(part.p1), H);
    const int64_t h0 = projects() ? team.begin(R) : u0, h1 = projects() ? team.end(R) : u1;
    int64_t ended = 0;
    for (int64_t t = seq_.steps - 1; t >= 0; --t) {
      const int64_t active = seq_.active(t), last = d_ ? 0 : t;
      const SavedStep kept(seq_, d_, last, H);
      for (int64_t b = max(ended, part.b0); b < min(active, part.b1); ++b) {
        const int64_t state = d_ * seq_.batch + b;
        std::memcpy(p_.h_n + state * R + h0, h_rows(last, b).data + h0, (h1 - h0) * sizeof(T));
        if (kHasC && p_.c_states)
          for (int64_t u = u0; u < u1; u += kLanes)
            std::memcpy(p_.c_n + state * H + u, kept.of(p_.c_states, b).of(u).data,
                        min<int64_t>(u1 - u, kLanes) * sizeof(S));
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
  S* const chunk_;
  const PackedLayout<PackedElem<T>> panels_;
};

template <class Cell, class T>
void run_forward(const ForwardParams<T>& p, const Plan& plan, const ParallelFor& parallel,
                 Workspace& workspace) {
  using Direction = ForwardDirection<Cell, T>;
  struct Call {
    const ForwardParams<T>& p;
    const Plan& plan;
    typename Direction::Shared shared[kMaxDirections];
    Acc<T>* chunks;
    int64_t chunk_size;

    Call(const ForwardParams<T>& p, const Plan& plan, Arena arena, size_t* used = nullptr)
        : p(p),
          plan(plan),
          shared{{p, plan, arena, 0}, {p, plan, arena, 1}} {
      chunk_size = Direction::chunk_size(p, plan) + 16;
      chunks = arena.alloc<Acc<T>>(chunk_size * plan.threads);
      if (used) *used = arena.used();
    }

    void direction(int d, Acc<T>* chunk, Team team) {
      Direction(p, plan, d, shared[d], chunk).run(team);
    }

    void run(Team team) {
      Acc<T>* const chunk = chunks + chunk_size * team.rank;
      if (p.directions == 2 && team.size % 2 == 0) {
        direction(team.rank % 2, chunk, team.half());
      } else {
        for (int d = 0; d < p.directions; ++d) direction(d, chunk, team);
      }
    }
  };
  run_on_team<Call>(p, plan, parallel, workspace);
}

}  // namespace rnnkern::RNNKERN_ISA
