// The backward pass of a layer, walked against time in chunks of steps.
//
// Within a chunk, per step: the cell turns the gradient of the states into gate gradients
// ("sums": gradients of the sums of the forward step), and dh of the step before is their product
// with W_hh (a projection comes first: projection.h). After a chunk, while its gate gradients are
// in the cache: dx, and the chunk's part of the weight gradients.
//
// A large batch of a small layer falls into blocks of rows that are walked one by one, each by a
// thread of its own or by all together, and whose weight gradients are added up in the end. Neither
// blocks nor chunks depend on the number of threads, and each element of a weight gradient is
// always summed in the same order.
#pragma once
#include "../../core/saved_layout.h"
#include "../simd/math.h"
#include "backward_shared.h"
#include "gate_grads.h"
#include "projection_backward.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

// A block of batch rows in one direction.
template <class Cell, class T>
class BackwardBlock {
  using S = Acc<T>;
  using F = PackedElem<T>;
  using V = Vec<S>;
  using Projection =
      std::conditional_t<std::is_same_v<T, S>, BackwardProjection<Cell, S>, NoProjection>;
  using Shared = BackwardShared<Cell, T>;
  static constexpr int kLanes = V::kLanes, kPanel = kMaxNR * kLanes;
  static constexpr bool kHasC = Cell::kStates > 1, kSaves = Cell::kSaved > 0 || kHasC;
  static constexpr bool kProjects = Cell::kProjects && Projection::kExists;
  static constexpr bool kSameSums = Cell::kInputPreact == Cell::kHiddenPreact;
  static_assert(Cell::kGates <= kMaxBatch);

 public:
  // Rows of a chunk, at most.
  static int64_t chunk_rows(const BackwardParams<T>& p, const Plan& plan) {
    return min(plan.wgrad_chunk, p.sequence.steps) * plan.wgrad_rows;
  }

  // Elements of a thread's buffer for a panel of x or h and for thin columns.
  static int64_t buffer_size(const BackwardParams<T>& p, const Plan& plan) {
    return panel_rows(p, plan) * kPanel + chunk_rows(p, plan) * NarrowWgrad<T>::kMostColumns + 16;
  }

  // What a block needs to itself comes out of `scratch`. dx is written, or added to if `add`.
  BackwardBlock(const BackwardParams<T>& p, const Plan& plan, int direction, int block,
                const Shared& shared, Arena& scratch, S* buffer, SequenceView<S> dx, bool add)
      : p_(p),
        seq_(p.sequence.part(block * plan.wgrad_rows,
                             min((block + 1) * plan.wgrad_rows, p.sequence.batch))),
        plan_(plan),
        d_(direction),
        shared_(shared),
        ih_(shared.ih),
        hh_(shared.hh),
        grads_(shared.grads[block]),
        buffer_(buffer),
        dx_(dx),
        add_(add),
        units_(unit_layout(p.hidden_size, p, plan)),
        dgates_(chunk_rows(p, plan), Cell::kPreacts * p.hidden_size, is_blocked(p, plan), scratch),
        dh_{nullptr, pad_to_odd_lines<S>(hh_.panels.padded_cols())},
        dc_{nullptr, units_.padded_cols()},
        projection_(p, seq_, direction, shared.hr, chunk_rows(p, plan), scratch),
        narrow_(narrow_columns(p, true, kSameSums), Cell::kGates, p.hidden_size, scratch),
        narrow_hidden_(narrow_columns(p, false, !kSameSums), Cell::kGates, p.hidden_size, scratch) {
    dh_.data = scratch.alloc<S>(seq_.batch * dh_.stride);
    if (kHasC) dc_.data = scratch.alloc<S>(seq_.batch * dc_.stride);
  }

  void run(Team team) {
    start(team);
    team.sync();
    for (int64_t end = seq_.steps; end > 0;) {
      const int64_t begin = max<int64_t>(end - plan_.wgrad_chunk, 0);
      time_loop(begin, end, team);
      team.sync();
      const WgradArgs<T> gradients = chunk(begin, end, team);
      input_dgrad(gradients, team);
      dgates_.interleave_rows(gradients.rows, team);
      wgrad(gradients);
      team.sync();
      end = begin;
    }
    finish(team);
    team.sync();
  }

 private:
  // Whether dsums stand in blocks of whole units.
  static bool is_blocked(const BackwardParams<T>& p, const Plan& plan) {
    const int64_t block = kKC * kVnniFactor<T>;
    return p.hidden_size > block && p.hidden_size % block == 0 && !plan.unpacked_weights;
  }

  // Rows of a panel of the right operand, or of dx.
  static int64_t panel_rows(const BackwardParams<T>& p, const Plan& plan) {
    return max(chunk_rows(p, plan), GateGrads<T>::depth(chunk_rows(p, plan)));
  }

  // Columns of x, of h and of the biases that are thin.
  static int64_t narrow_columns(const BackwardParams<T>& p, bool input, bool hidden) {
    return (input ? NarrowWgrad<T>::columns({p.input_size, 1}) + 1 : 0) +
           (hidden ? NarrowWgrad<T>::columns({p.h_size(), 1}) + 1 : 0);
  }

  int64_t time(int64_t s) const { return d_ ? seq_.steps - 1 - s : s; }

  bool projects() const { return kProjects && p_.proj_size; }

  // Where the states of batch row b stand in h_n, c_n and their like.
  int64_t state_row(int64_t b) const { return d_ * p_.sequence.batch + seq_.first + b; }

  // Each rank's batch rows in row mode, or all; and its panels of a matrix's columns, or all.
  WorkRange part(Team team, const PackedLayout<F>& columns) const {
    const int64_t count = columns.count();
    if (plan_.split_units) return {0, seq_.batch, team.begin(count), team.end(count)};
    return {team.begin(seq_.batch), team.end(seq_.batch), 0, count};
  }

  // The carried gradients begin as those of the final states; a row that has not ended yet at a
  // step is not touched.
  void start(Team team) {
    const int64_t H = p_.hidden_size;
    const auto load = [&](const S* given, int64_t width, StridedRows<S> carried) {
      for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
        const int64_t taken = given ? width : 0;
        if (given) std::memcpy(carried[b], given + state_row(b) * width, taken * sizeof(S));
        std::memset(carried[b] + taken, 0, (carried.stride - taken) * sizeof(S));
      }
    };
    load(p_.dh_n, p_.h_size(), dh_);
    if (kHasC) load(p_.dc_n, H, dc_);
    if constexpr (kProjects)
      if (projects()) projection_.start(team);
  }

  void finish(Team team) const {
    narrow_.finish(team, Cell::input_gate);
    if (!kSameSums) narrow_hidden_.finish(team, Cell::hidden_gate);
    if constexpr (kProjects)
      if (projects()) projection_.finish(team);
    const int64_t H = p_.hidden_size, R = p_.h_size();
    for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
      if (p_.dh_0) std::memcpy(p_.dh_0 + state_row(b) * R, dh_[b], R * sizeof(S));
      if (kHasC && p_.dc_0) std::memcpy(p_.dc_0 + state_row(b) * H, dc_[b], H * sizeof(S));
    }
  }

  // First row of step s in dsums, whose rows are in the order of the steps, or as packed.
  int64_t chunk_row(int64_t s, int64_t begin, int64_t end) const {
    return seq_.rows(min(time(begin), time(end - 1)), time(s));
  }

  void time_loop(int64_t begin, int64_t end, Team team) {
    const WorkRange mine = part(team, units_), of_h = part(team, hh_.panels);
    for (int64_t s = end - 1; s >= begin; --s) {
      const int64_t active = min(seq_.active(time(s)), mine.b1);
      const int64_t before = s ? seq_.active(time(s - 1)) : 0;
      const int64_t carried = max(min(before, active), mine.b0);
      const int64_t row = chunk_row(s, begin, end);
      const BlockedMatrix<F> dgates = dgates_.at_row(row, 0);
      if constexpr (kProjects)
        if (projects()) projection_dgrad(s, row, mine, of_h, active, team);
      if (mine.b0 < carried) cell_backward(s, mine, mine.b0, carried, true, dgates);
      if (carried < active) cell_backward(s, mine, carried, active, false, dgates);
      if (plan_.split_units) team.sync();
      if (mine.b0 < active) propagate_dh(s, of_h, active, dgates);
    }
  }

  // The adjoint of the projection: the cell's dh, for the worker's rows below `active`.
  void projection_dgrad(int64_t s, int64_t row, const WorkRange& mine, const WorkRange& of_h,
                        int64_t active, Team team) {
    const int64_t t = time(s), row_end = hh_.panels.padded_cols();
    const int64_t first = hh_.panels.first_unit(of_h.p0), last = hh_.panels.first_unit(of_h.p1);
    projection_.collect_dh(t, row, mine.b0, active, first, min(last, row_end), dh_);
    if (plan_.split_units) team.sync();
    if (mine.b0 < active)
      for (int64_t panel = mine.p0; panel < mine.p1; ++panel)
        projection_.dgrad(t, row, mine.b0, active, panel);
  }

  // The adjoint of the cell for batch rows [r0, r1) of step s.
  void cell_backward(int64_t s, const WorkRange& part, int64_t r0, int64_t r1, bool carried,
                     BlockedMatrix<F> dgates) {
    const int64_t H = p_.hidden_size, t = time(s), before_d = d_ * p_.sequence.rows();
    const int64_t row = before_d + seq_.row(t), state = state_row(0) * H;
    const int64_t y_row = p_.y.b_stride, t_prev = carried ? time(s - 1) : 0;
    StridedRows<S> dh_rows = dh_;
    if constexpr (kProjects)
      if (projects()) dh_rows = projection_.dm();
    const T* const dy_rows = projects() || !p_.dy.data ? nullptr : p_.dy.at(seq_, t) + d_ * H;
    S* const flow_h = projects() ? nullptr : p_.flow_h;
    const auto initial = [&]<class U>(const U* given) {
      if (given) return StridedRows<const U>{given + state, H};
      return StridedRows<const U>{reinterpret_cast<const U*>(shared_.zeros), 0};
    };
    const StridedRows<const T> h{p_.y.at(seq_, t) + d_ * H, y_row};
    StridedRows<const T> h_prev{p_.y.at(seq_, t_prev) + d_ * H, y_row};
    if (!carried) h_prev = initial(p_.h0);
    const SavedStep step(p_.sequence, d_, t, H);
    const SavedValues<const T> kept = step.of(p_.saved, seq_.first, Cell::kSaved);
    const SavedValues<const S> c_next = step.of(p_.c_states, seq_.first);
    CStates<const S> c_prev;
    if (carried)
      c_prev.saved = SavedStep(p_.sequence, d_, t_prev, H).of(p_.c_states, seq_.first);
    else
      c_prev.plain = initial(p_.c0);
    // Panel by panel, as the forward pass wrote what it kept; else row by row.
    const int64_t begin = units_.first_unit(part.p0);
    const int64_t end = min(units_.first_unit(part.p1), H);
    for (int64_t first = begin, last; first < end; first = last) {
      last = kSaves ? min(first + kPanel, end) : end;
      struct {
        StridedRows<const T> saved;
        StridedRows<const S> c_prev, c_next;
        int64_t step;
      } of[kMaxNR];
      if constexpr (kSaves)
        for (int64_t v = 0; first + v * kLanes < last; ++v) {
          const int64_t u = first + v * kLanes;
          if (Cell::kSaved) of[v].saved = kept.of(u), of[v].step = kept.value_stride(u);
          if (kHasC) of[v].c_prev = c_prev.of(u), of[v].c_next = c_next.of(u);
        }
      for (int64_t b = r0; b < r1; ++b) {
        const T* const dy = dy_rows ? dy_rows + b * p_.dy.b_stride : nullptr;
        S *const dh = dh_rows[b], *const dc = dc_[b];
        // The cell for a few vectors of units from the v-th on, of `lanes` units each.
        const auto units = [&]<int kVectors>(std::integral_constant<int, kVectors>, int64_t v,
                                             int lanes) __attribute__((always_inline)) {
          using A = VecArray<S, kVectors>;
          A saved[Cell::kSaved + 1], prev[2], next[2], dnext[2], dprev[2], dgate[Cell::kPreacts];
#pragma GCC unroll 2
          for (int i = 0; i < kVectors; ++i) {
            const int64_t u = first + (v + i) * kLanes;
            for (int k = 0; k < Cell::kSaved; ++k)
              saved[k].v[i] = V::load(of[v + i].saved[b] + k * of[v + i].step, lanes);
            if constexpr (!Cell::kProjects) {
              prev[0].v[i] = V::load(h_prev[b] + u, lanes);
              next[0].v[i] = V::load(h[b] + u, lanes);
            }
            dnext[0].v[i] = V::load(dh + u);
            if (dy) dnext[0].v[i] = dnext[0].v[i] + V::load(dy + u, lanes);
            if constexpr (kHasC) {
              prev[1].v[i] = V::load(of[v + i].c_prev[b], lanes);
              next[1].v[i] = V::load(of[v + i].c_next[b], lanes);
              dnext[1].v[i] = V::load(dc + u);
            }
          }
          Cell::backward(saved, prev, next, dnext, dprev, dgate);
#pragma GCC unroll 2
          for (int i = 0; i < kVectors; ++i) {
            const int64_t u = first + (v + i) * kLanes;
            for (int k = 0; k < Cell::kPreacts; ++k)
              dgate[k].v[i].store(GateGrads<T>::element(dgates, b, k * H + u), lanes);
            if (flow_h) dnext[0].v[i].store(flow_h + (row + b) * H + u, lanes);
            dprev[0].v[i].store(dh + u);
            if constexpr (kHasC) {
              if (p_.flow_c) dnext[1].v[i].store(p_.flow_c + (row + b) * H + u, lanes);
              dprev[1].v[i].store(dc + u);
            }
          }
        };
        const int64_t whole = (last - first) / kLanes;
        int64_t v = 0;
        for (; v + 2 <= whole; v += 2) units(std::integral_constant<int, 2>(), v, kLanes);
        if (v < whole) units(std::integral_constant<int, 1>(), v++, kLanes);
        const int left = int(last - first - v * kLanes);
        if (left) units(std::integral_constant<int, 1>(), v, left);
      }
    }
  }

  // dh += dsums W_hh, for the worker's rows below `active` and its units; dx = dsums W_ih, where
  // W_ih stands beside W_hh.
  void propagate_dh(int64_t s, const WorkRange& part, int64_t active, BlockedMatrix<F> dgates) {
    const int64_t rows = active - part.b0;
    S* const dx = dh_[part.b0] + hh_.appended_offset();
    if (hh_.appended)
      for (int64_t b = 0; b < rows; ++b)
        std::memset(dx + b * dh_.stride, 0, p_.input_size * sizeof(S));
    for (int64_t i = part.p0; i < part.p1; ++i) {
      const int64_t panel = serpentine(i, s, part);
      hh_.gemm_accumulate(
          dgates.at_row(part.b0, Cell::kHiddenPreact * p_.hidden_size / kVnniFactor<T>), rows,
          panel, {dh_[part.b0] + hh_.panels.first_unit(panel), dh_.stride},
          next_serpentine(i, s, part));
    }
    if (hh_.appended)
      write_tile(dx, int(dh_.stride), rows, p_.input_size,
                 dx_.data + (seq_.row(time(s)) + part.b0) * dx_.b_stride, dx_.b_stride, add_);
  }

  WgradArgs<T> chunk(int64_t begin, int64_t end, Team team) const {
    const int64_t t0 = min(time(begin), time(end - 1));
    const int64_t t1 = t0 + end - begin;
    return {seq_,
            t0,
            t1,
            seq_.rows(t0, t1),
            dgates_.vnni(),
            p_.hidden_size,
            Cell::kGates,
            end == seq_.steps,
            team,
            reinterpret_cast<F*>(buffer_),
            reinterpret_cast<F*>(buffer_ + panel_rows(p_, plan_) * kPanel),
            dgates_.transposed()};
  }

  // dx = dsums W_ih for the chunk, its rows split over the team.
  void input_dgrad(const WgradArgs<T>& chunk, Team team) {
    if (!dx_.data || hh_.appended) return;
    const int64_t first = team.begin(chunk.rows), count = team.end(chunk.rows) - first;
    const BlockedMatrix<F> dgates = dgates_.at_row(first, Cell::kInputPreact * p_.hidden_size);
    for (int64_t panel = 0; panel < ih_.panels.count(); ++panel) {
      const int64_t width = ih_.panels.ldb(panel), column = ih_.panels.first_unit(panel);
      std::memset(buffer_, 0, count * width * sizeof(S));
      ih_.gemm_accumulate(dgates, count, panel, {buffer_, width},
                          panel + 1 < ih_.panels.count() ? panel + 1 : -1);
      int64_t begin = -first;  // of a step's rows in the buffer
      for (int64_t t = chunk.t0; t < chunk.t1; begin += seq_.active(t++)) {
        const int64_t r = max<int64_t>(begin, 0), end = min(begin + seq_.active(t), count);
        if (r < end)
          write_tile(buffer_ + r * width, int(width), end - r, p_.input_size - column,
                     dx_.data + (seq_.row(t) + r - begin) * dx_.b_stride + column, dx_.b_stride,
                     add_);
      }
    }
  }

  void wgrad(const WgradArgs<T>& chunk) {
    const WeightGrads<S>& g = grads_;
    static constexpr T kOne = one<T>();  // a bias is the weight of an input that is always 1
    const auto ones = [](int64_t, int64_t, int64_t) { return &kOne; };
    const auto x = [&](int64_t, int64_t t, int64_t b) {
      return p_.x.at(seq_, t) + b * p_.x.b_stride;
    };
    const auto h_prev = [&](int64_t, int64_t t, int64_t b) -> const T* {
      const int64_t R = p_.h_size(), previous = t + (d_ ? 1 : -1);
      if (previous >= 0 && previous < seq_.steps && b < seq_.active(previous))
        return p_.y.at(seq_, previous) + b * p_.y.b_stride + d_ * R;
      return p_.h0 ? p_.h0 + state_row(b) * R : reinterpret_cast<const T*>(shared_.zeros);
    };
    narrow_.clear();
    if (g.ih)
      accumulate_wgrad(chunk, g.ih, ih_.panels, Cell::kInputPreact, Cell::input_gate, x, narrow_);
    if (g.bias_ih) narrow_.gather(chunk, g.bias_ih, 1, 0, 1, ones);
    if (!kSameSums) narrow_.add(chunk, Cell::kInputPreact), narrow_hidden_.clear();
    NarrowWgrad<T>& narrow_hidden = kSameSums ? narrow_ : narrow_hidden_;
    if (g.hh)
      accumulate_wgrad(chunk, g.hh, PackedLayout<F>(p_.h_size(), 1), Cell::kHiddenPreact,
                       Cell::hidden_gate, h_prev, narrow_hidden);
    if (g.bias_hh) narrow_hidden.gather(chunk, g.bias_hh, 1, 0, 1, ones);
    narrow_hidden.add(chunk, Cell::kHiddenPreact);
    if constexpr (kProjects)
      if (projects()) projection_.wgrad(chunk, g.hr);
  }

  const BackwardParams<T>& p_;
  const Sequence seq_;
  const Plan& plan_;
  const int d_;
  const Shared& shared_;
  const PackedWeights<T>&ih_, &hh_;
  const WeightGrads<S>& grads_;
  S* const buffer_;
  const SequenceView<S> dx_;
  const bool add_;
  const PackedLayout<F> units_;
  const GateGrads<T> dgates_;
  StridedRows<S> dh_,
      dc_;  // rows of R and H in whole vectors: gradients of the states, carried back
  Projection projection_;
  NarrowWgrad<T> narrow_, narrow_hidden_;  // the second if input and hidden sums differ
};

}  // namespace rnnkern::RNNKERN_ISA
