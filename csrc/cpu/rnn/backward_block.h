// The backward pass of one direction for a block of batch rows, from the last step to the first,
// in chunks of steps:
//
//   per step    projection_dgrad  dm = dh W_hr                  (with a projection)
//               cell_backward     dL/dstates -> gate gradients  (dgates)
//               propagate_dh      dh of the step before = dgates W_hh
//   per chunk   input_dgrad       dx = dgates W_ih, while dgates are in the cache
//               wgrad             dW += dgates^T X
//
// A large batch of a small layer has several blocks. One thread each, or all threads together, run
// them one by one; their weight gradients are summed at the end. Neither blocks nor chunks depend
// on the number of threads, and each element of a weight gradient is summed in the same order.
#pragma once
#include "../../core/saved_layout.h"
#include "backward_resets.h"
#include "block_wgrad.h"
#include "cell_backward.h"
#include "hidden_mask.h"
#include "projection_backward.h"
#include "time_loop.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class BackwardBlock {
  using S = Acc<T>;
  using F = PackedElem<T>;
  using Projection =
      std::conditional_t<std::is_same_v<T, S>, BackwardProjection<Cell, S>, NoProjection>;
  using Shared = BackwardShared<Cell, T>;
  using StepOperands = BackwardOperands<Cell, T>;
  static constexpr int kPanel = kMaxNR * Vec<S>::kLanes;
  static constexpr int kCValues = Cell::kStates - 1;  // states besides h
  static constexpr bool kHasC = kCValues > 0;
  static constexpr bool kProjects = Cell::kProjects && Projection::kExists;
  static constexpr bool kRecurs = Products<Cell>::kRecurs, kHeads = Shared::kHeads;
  static constexpr bool kGiven = Products<Cell>::kGiven;
  static constexpr int kProducts = Products<Cell>::kCount, kHidden = Products<Cell>::kHidden;
  static_assert(Cell::kGates <= kMaxBatch);

 public:
  // Rows of a chunk, at most.
  static int64_t chunk_rows(const BackwardParams<T>& p, const Plan& plan) {
    const Sequence& seq = p.sequence;
    return min(plan.wgrad_chunk, seq.steps) * seq.largest_block(plan.blocks(seq.batch));
  }

  // Elements of a thread's buffer for a panel of x or h and for narrow columns.
  static int64_t buffer_size(const BackwardParams<T>& p, const Plan& plan) {
    const int64_t normalized = RowNorm<Cell>::kState ? 2 * norm_stride(p.hidden_size) : 0;
    return max(panel_rows(p, plan) * kPanel + chunk_rows(p, plan) * Wgrad<T>::kMaxNarrowColumns,
               normalized) +
           16;
  }

  // `scratch` provides the block's own memory. dx is written, or added to if `accumulate_dx`.
  BackwardBlock(const BackwardParams<T>& p, const Plan& plan, int direction, int block,
                const Shared& shared, Arena& scratch, S* buffer, SequenceView<S> dx,
                bool accumulate_dx)
      : p_(p),
        seq_(p.sequence.part(p.sequence.block_begin(block, plan.blocks(p.sequence.batch)),
                             p.sequence.block_begin(block + 1, plan.blocks(p.sequence.batch)))),
        plan_(plan),
        d_(direction),
        shared_(shared),
        ih_(shared.ih),
        hh_(shared.hh),
        buffer_(buffer),
        dx_(dx),
        accumulate_dx_(accumulate_dx),
        units_(Shared::hidden_layout(p.hidden_size, p, plan)),
        dgates_(chunk_rows(p, plan), (kProducts + Cell::kParams) * p.hidden_size,
                is_blocked(p, plan), scratch),
        dh_{nullptr, pad_to_odd_lines<S>(hh_.panels.padded_cols())},
        dc_{nullptr, kCValues * units_.padded_cols()},
        projection_(p, seq_, direction, shared.hr, shared.grads[block].hr, chunk_rows(p, plan),
                    scratch),
        cell_backward_(p, direction, units_),
        resets_(p, seq_, shared.zeros, hh_.panels, units_),
        wgrad_(p, shared, shared.grads[block], scratch),
        masked_(p, seq_, direction, chunk_rows(p, plan), scratch) {
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
      const WgradArgs<T> args = chunk(begin, end, team);
      input_dgrad(args, team);
      dgates_.interleave_rows(args.rows, team);
      wgrad(args);
      team.sync();
      end = begin;
    }
    finish(team);
    team.sync();
  }

 private:
  static int64_t norm_stride(int64_t units) { return PackedLayout<F>(units, 1).padded_cols(); }

  // Whether gate gradients are in blocks of whole units.
  static bool is_blocked(const BackwardParams<T>& p, const Plan& plan) {
    const int64_t block = kKC * kVnniFactor<T>;
    const int64_t columns = kHeads ? p.hidden_size / p.heads : p.hidden_size;  // that GEMMs take
    return p.hidden_size > block && columns % block == 0 && !plan.unpacked_weights;
  }

  // Rows of a panel of the right operand, or of dx.
  static int64_t panel_rows(const BackwardParams<T>& p, const Plan& plan) {
    return max(chunk_rows(p, plan), GateGrads<T>::k_of(chunk_rows(p, plan)));
  }

  int64_t time(int64_t s) const { return d_ ? seq_.steps - 1 - s : s; }

  bool projects() const { return kProjects && p_.proj_size; }

  // Elements of dc_ from one value of a unit to the next.
  int64_t c_stride() const { return units_.padded_cols(); }

  // The row of batch row b in h_n, c_n and their like.
  int64_t state_row(int64_t b) const { return d_ * p_.sequence.batch + seq_.first + b; }

  // Of steps [begin, end). Split by rows: each rank's batch rows, all columns. Split by units: all
  // rows, its panels.
  WorkRange range(int64_t begin, int64_t end, Team team, const PackedLayout<F>& columns) const {
    const int64_t count = columns.count();
    if (plan_.split_units) return {0, seq_.batch, team.begin(count), team.end(count)};
    const int64_t t0 = min(time(begin), time(end - 1)), t1 = t0 + end - begin;
    return {seq_.block_begin(team.rank, team.size, t0, t1),
            seq_.block_begin(team.rank + 1, team.size, t0, t1), 0, count};
  }

  // The carried gradients begin as those of the final states. A row that has not ended yet at a
  // step is not touched.
  void start(Team team) {
    const int64_t H = p_.hidden_size;
    const auto load = [&](const S* given, int64_t width, StridedRows<S> carried, int values) {
      const int64_t copied = given ? width : 0, stride = carried.stride / values;
      for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b)
        for (int k = 0; k < values; ++k) {
          S* const to = carried[b] + k * stride;
          if (given)
            std::memcpy(to, given + (state_row(b) * values + k) * width, copied * sizeof(S));
          std::memset(to + copied, 0, (stride - copied) * sizeof(S));
        }
    };
    load(p_.dh_n, p_.h_size(), dh_, 1);
    if constexpr (kHasC) load(p_.dc_n, H, dc_, kCValues);
    if constexpr (kProjects)
      if (projects()) projection_.start(team);
  }

  void finish(Team team) const {
    wgrad_.write(team);
    if constexpr (kProjects)
      if (projects()) projection_.write_wgrad(team);
    const int64_t H = p_.hidden_size, R = p_.h_size();
    for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
      if (p_.dh_0) std::memcpy(p_.dh_0 + state_row(b) * R, dh_[b], R * sizeof(S));
      if (p_.dc_0)
        for (int k = 0; k < kCValues; ++k)
          std::memcpy(p_.dc_0 + (state_row(b) * kCValues + k) * H, dc_[b] + k * c_stride(),
                      H * sizeof(S));
    }
  }

  // First row of step s in dgates, whose rows are in the order of t.
  int64_t chunk_row(int64_t s, int64_t begin, int64_t end) const {
    return seq_.rows(min(time(begin), time(end - 1)), time(s));
  }

  // Steps [begin, end), the last one first.
  void time_loop(int64_t begin, int64_t end, Team team) {
    const WorkRange mine = range(begin, end, team, units_);
    const WorkRange of_h = range(begin, end, team, hh_.panels);
    for (int64_t s = end - 1; s >= begin; --s) {
      const int64_t active = min(seq_.active(time(s)), mine.b1);
      const int64_t before = s ? seq_.active(time(s - 1)) : 0;
      const int64_t carried = max(min(before, active), mine.b0);
      const int64_t row = chunk_row(s, begin, end);
      const BlockedMatrix<F> dgates = dgates_.at_row(row, 0);
      if constexpr (kProjects)
        if (projects()) projection_dgrad(s, row, mine, of_h, active, team);
      if (p_.resets.data) {
        cell_backward_with_resets(s, mine, dgates);
      } else {
        if (mine.b0 < carried)
          cell_backward_(step_operands(s, true, dgates), mine, mine.b0, carried);
        if (carried < active)
          cell_backward_(step_operands(s, false, dgates), mine, carried, active);
      }
      if constexpr (kRecurs) {
        if (plan_.split_units) team.sync();
        if (mine.b0 < active) propagate_dh(s, of_h, active, dgates);
      }
      if (p_.resets.data) resets_.end_gradients(time(s), dh_, mine, of_h, dc_);
    }
  }

  // A step's rows in runs that are reset before it, and that are not.
  __attribute__((noinline)) void cell_backward_with_resets(int64_t s, const WorkRange& mine,
                                                           BlockedMatrix<F> dgates) {
    const int64_t t = time(s);
    const StepOperands own = step_operands(s, s > 0, dgates);
    StepOperands reset = own;
    reset.h_prev = resets_.h(t);
    reset.c_prev = resets_.c(t);
    for (int64_t b = mine.b0, end; b < mine.b1; b = end) {
      const bool is = resets_.is_reset(t, b);
      for (end = b + 1; end < mine.b1 && resets_.is_reset(t, end) == is;) ++end;
      cell_backward_(is ? reset : own, mine, b, end);
    }
  }

  // The adjoint of the projection, for the worker's rows below `active`: the cell's dh.
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

  // `carried`: the rows have a previous step; else the states before are the initial ones.
  StepOperands step_operands(int64_t s, bool carried, BlockedMatrix<F> dgates) const {
    const int64_t H = p_.hidden_size, t = time(s), t_prev = carried ? time(s - 1) : 0;
    const int64_t C = kCValues * H, y_row = p_.y.b_stride;
    const int64_t row = d_ * p_.sequence.rows() + seq_.row(t);
    const auto initial = [&]<class U>(const U* given, int64_t width) {
      if (given) return StridedRows<const U>{given + state_row(0) * width, width};
      return StridedRows<const U>{reinterpret_cast<const U*>(shared_.zeros), 0};
    };
    StepOperands step{};
    step.set_masks(p_, seq_, d_, t, 0);
    if (kGiven && dx_.data)
      step.set_sums({dx_.data + seq_.row(t) * dx_.b_stride, dx_.b_stride}, d_, H);
    step.h = {p_.y.at(seq_, t) + d_ * H, y_row};
    step.h_prev = {p_.y.at(seq_, t_prev) + d_ * H, y_row};
    if (!carried) step.h_prev = initial(p_.h0, H);
    const SavedStep saved(p_.sequence, d_, t, H);
    step.saved = saved.of(p_.saved, seq_.first, Cell::kSaved);
    step.c_next = saved.of(p_.c_states, seq_.first, kCValues);
    if (carried)
      step.c_prev.saved =
          SavedStep(p_.sequence, d_, t_prev, H).of(p_.c_states, seq_.first, kCValues);
    else
      step.c_prev.plain = initial(p_.c0, C), step.c_prev.plain_stride = p_.c0 ? H : 0;
    step.dh = dh_, step.dc = dc_, step.dgates = dgates;
    if constexpr (RowNorm<Cell>::kState)
      step.normalized = buffer_, step.dstate = buffer_ + norm_stride(H);
    if (p_.flow_c) step.flow_c = {p_.flow_c + row * C, C};
    if constexpr (kProjects)
      if (projects()) {  // which has taken dy, and written flow_h
        step.dh = projection_.dm();
        return step;
      }
    if (p_.dy.data) step.dy = {p_.dy.at(seq_, t) + d_ * H, p_.dy.b_stride};
    if (p_.flow_h) step.flow_h = {p_.flow_h + row * H, H};
    return step;
  }

  // dh += dgates W_hh, for the worker's rows below `active` and its panels; dx = dgates W_ih, where
  // W_ih's columns are appended to W_hh's.
  void propagate_dh(int64_t s, const WorkRange& range, int64_t active, BlockedMatrix<F> dgates) {
    if constexpr (Cell::kMasksHidden)
      return masked_.propagate_dh(hh_, s, time(s), range, active, dgates, buffer_, dh_);
    const int64_t rows = active - range.b0;
    S* const dx = dh_[range.b0] + hh_.appended_offset();
    if (hh_.appended)
      for (int64_t b = 0; b < rows; ++b)
        std::memset(dx + b * dh_.stride, 0, p_.input_size * sizeof(S));
    for (int64_t i = range.p0; i < range.p1; ++i) {
      const int64_t panel = serpentine(i, s, range);
      hh_.gemm_accumulate(dgates.at_row(range.b0, kHidden * p_.hidden_size / kVnniFactor<T>), rows,
                          panel, {dh_[range.b0] + hh_.panels.first_unit(panel), dh_.stride},
                          next_serpentine(i, s, range));
    }
    if (hh_.appended)
      write_tile(dx, int(dh_.stride), rows, p_.input_size,
                 dx_.data + (seq_.row(time(s)) + range.b0) * dx_.b_stride, dx_.b_stride,
                 accumulate_dx_);
  }

  WgradArgs<T> chunk(int64_t begin, int64_t end, Team team) const {
    const int64_t t0 = min(time(begin), time(end - 1));
    const int64_t t1 = t0 + end - begin;
    return {seq_,
            t0,
            t1,
            seq_.rows(t0, t1),
            dgates_.vnni(),
            dgates_.transposed(),
            end == seq_.steps,
            team,
            reinterpret_cast<F*>(buffer_),
            reinterpret_cast<F*>(buffer_ + panel_rows(p_, plan_) * kPanel)};
  }

  // dx = dgates W_ih for the chunk, whose rows the team splits.
  void input_dgrad(const WgradArgs<T>& chunk, Team team) {
    if (kGiven || !dx_.data || hh_.appended) return;
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
                     accumulate_dx_);
      }
    }
  }

  // h of batch row b before step t.
  const T* h_before(int64_t t, int64_t b) const {
    const int64_t R = p_.h_size(), previous = t + (d_ ? 1 : -1);
    if (resets_.is_reset(t, b)) return resets_.h(t)[b];
    if (previous >= 0 && previous < seq_.steps && b < seq_.active(previous))
      return p_.y.at(seq_, previous) + b * p_.y.b_stride + d_ * R;
    return p_.h0 ? p_.h0 + state_row(b) * R : reinterpret_cast<const T*>(shared_.zeros);
  }

  void wgrad(const WgradArgs<T>& chunk) {
    const auto x = [&](int64_t, int64_t t, int64_t b) {
      return p_.x.at(seq_, t) + b * p_.x.b_stride;
    };
    if constexpr (Cell::kMasksHidden)
      masked_.multiply(chunk, [&](int64_t t, int64_t b) { return h_before(t, b); });
    const auto h_prev = [&](int64_t k, int64_t t, int64_t b) {
      if constexpr (Cell::kMasksHidden) return masked_.row(k);
      return h_before(t, b);
    };
    wgrad_.accumulate(chunk, x, h_prev);
    if constexpr (kProjects)
      if (projects()) projection_.wgrad(chunk);
  }

  const BackwardParams<T>& p_;
  const Sequence seq_;
  const Plan& plan_;
  const int d_;
  const Shared& shared_;
  const PackedWeights<T>& ih_;
  const typename Shared::HiddenWeights& hh_;
  S* const buffer_;
  const SequenceView<S> dx_;
  const bool accumulate_dx_;
  const PackedLayout<F> units_;
  const GateGrads<T> dgates_;
  StridedRows<S> dh_, dc_;  // gradients of the states, carried back; rows of whole vectors
  Projection projection_;
  const CellBackward<Cell, T> cell_backward_;
  const BackwardResets<Cell, T> resets_;
  BlockWgrad<Cell, T> wgrad_;
  const HiddenMask<Cell, T> masked_;
};

}  // namespace rnnkern::RNNKERN_ISA
