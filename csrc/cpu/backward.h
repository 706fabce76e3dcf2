// The backward pass of a layer, walked against time in chunks of steps.
//
// Within a chunk, per step: the cell turns the gradient of the states into gate gradients
// ("sums": gradients of the sums of the forward step), and dh of the step before is their product
// with W_hh. After a chunk, while its gate gradients are in the cache: dx, and the chunk's part of
// the weight gradients. Chunks do not depend on the number of threads, and a weight gradient is
// always summed by one thread in the same order.
#pragma once
#include "forward.h"
#include "weight_gradient.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class BackwardDirection {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kHasC = Cell::kStates > 1;

 public:
  // Steps of the chunk, at most.
  static int64_t chunk_rows(const Backward<T>& p, const Plan& plan) {
    return least(plan.gradient_chunk, p.sequence.steps) * p.sequence.batch;
  }
  // An odd number of cache lines, so that a column of dsums does not fall into one cache set.
  static int64_t sums_stride(const Backward<T>& p) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((Cell::kSums * p.hidden_size + kLine - 1) / kLine | 1) * kLine;
  }

  // What the workers of a direction share.
  struct Shared {
    T *ih, *hh;  // packed weights
    T* dsums;    // (chunk rows, kSums H)
    T *dh, *dc;  // (B, H rounded up to whole vectors): gradients of the states, carried back
    T* zeros;
    int64_t state_stride;

    Shared(const Backward<T>& p, const Plan& plan, Arena& arena, int direction) {
      if (direction >= p.directions) return;
      const Panels<T> inputs(p.input_size, 1), units(p.hidden_size, 1);
      state_stride = units.row();
      ih = arena.take<T>(inputs.size(Cell::kGates * p.hidden_size));
      hh = arena.take<T>(units.size(Cell::kGates * p.hidden_size));
      dsums = arena.take<T>(chunk_rows(p, plan) * sums_stride(p));
      dh = arena.take<T>(p.sequence.batch * state_stride);
      dc = arena.take<T>(kHasC ? p.sequence.batch * state_stride : 0);
      zeros = arena.take<T>(greatest(p.hidden_size, int64_t(kLanes)));
    }
  };

  // Elements of a worker's buffer for a panel of x or h.
  static int64_t panel_size(const Backward<T>& p, const Plan& plan) {
    return chunk_rows(p, plan) * kTileVectors * kLanes;
  }

  // dx is written, or added to if `add`.
  BackwardDirection(const Backward<T>& p, const Plan& plan, int direction, const Shared& shared,
                    T* panel, Rows<T> dx, bool add)
      : p_(p),
        seq_(p.sequence),
        plan_(plan),
        d_(direction),
        shared_(shared),
        buffer_(panel),
        dx_(dx),
        add_(add),
        inputs_(p.input_size, 1),
        units_(p.hidden_size, 1),
        stride_(sums_stride(p)) {}

  void run(Team team) {
    pack(team);
    start(team);
    team.sync();
    for (int64_t end = seq_.steps; end > 0;) {
      const int64_t begin = greatest<int64_t>(end - plan_.gradient_chunk, 0);
      walk(begin, end, team);
      team.sync();
      const ChunkGradients<T> gradients = chunk(begin, end, team);
      input_gradient(gradients, team);
      weight_gradients(gradients);
      team.sync();
      end = begin;
    }
    finish(team);
  }

 private:
  int64_t time(int64_t s) const { return d_ ? seq_.steps - 1 - s : s; }

  // Row k of a packed panel is one unit of one gate.
  void pack(Team team) {
    const int64_t H = p_.hidden_size, depth = Cell::kGates * H;
    const auto pack_all = [&](const auto& w) {
      const int64_t columns = w.panels.units, count = w.lying ? 0 : w.panels.count();
      for (int64_t panel = team.begin(count); panel < team.end(count); ++panel)
        pack_rows(
            w.panels, panel, depth,
            [&](int64_t k) { return w.weight + (w.gate_of(int(k / H)) * H + k % H) * columns; },
            w.packed + w.panels.before(panel) * depth);
    };
    if (dx_.data) pack_all(input_weight());
    pack_all(hidden_weight());
  }

  // Each rank's batch rows in row mode, or all; and its panels of units, or all.
  Part part(Team team) const {
    const int64_t count = units_.count();
    if (plan_.by_units) return {0, seq_.batch, team.begin(count), team.end(count)};
    return {team.begin(seq_.batch), team.end(seq_.batch), 0, count};
  }
  int64_t first_unit(int64_t panel) const {
    return least(units_.first_unit(panel), shared_.state_stride);
  }

  // The carried gradients begin as those of the final states; a row that has not ended yet at a
  // step is not touched.
  void start(Team team) {
    const int64_t H = p_.hidden_size;
    if (team.rank == 0)
      for (int64_t u = 0; u < greatest(H, int64_t(kLanes)); ++u) shared_.zeros[u] = 0;
    const auto load = [&](const T* given, T* carried) {
      for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
        T* row = carried + b * shared_.state_stride;
        const T* from = given ? given + (d_ * seq_.batch + b) * H : nullptr;
        for (int64_t u = 0; u < shared_.state_stride; ++u) row[u] = from && u < H ? from[u] : 0;
      }
    };
    load(p_.dh_n, shared_.dh);
    if (kHasC) load(p_.dc_n, shared_.dc);
  }

  void finish(Team team) const {
    const int64_t H = p_.hidden_size;
    for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
      const int64_t state = (d_ * seq_.batch + b) * H;
      if (p_.dh_0)
        std::memcpy(p_.dh_0 + state, shared_.dh + b * shared_.state_stride, H * sizeof(T));
      if (kHasC && p_.dc_0)
        std::memcpy(p_.dc_0 + state, shared_.dc + b * shared_.state_stride, H * sizeof(T));
    }
  }

  // First row of step s in dsums, whose rows are in the order of the steps, or as packed.
  int64_t chunk_row(int64_t s, int64_t begin, int64_t end) const {
    if (!seq_.offsets) return (time(s) - least(time(begin), time(end - 1))) * seq_.batch;
    return seq_.row(time(s)) - seq_.row(least(time(begin), time(end - 1)));
  }

  void walk(int64_t begin, int64_t end, Team team) {
    const Part mine = part(team);
    for (int64_t s = end - 1; s >= begin; --s) {
      const int64_t active = least(seq_.active(time(s)), mine.b1);
      const int64_t before = s ? seq_.active(time(s - 1)) : 0;
      const int64_t carried = greatest(least(before, active), mine.b0);
      T* const dsums = shared_.dsums + chunk_row(s, begin, end) * stride_;
      if (mine.b0 < carried) differentiate(s, mine, mine.b0, carried, true, dsums);
      if (carried < active) differentiate(s, mine, carried, active, false, dsums);
      if (plan_.by_units) team.sync();
      if (mine.b0 < active) carry_back(s, mine, active, dsums);
    }
  }

  // The adjoint of the cell for batch rows [r0, r1) of step s.
  void differentiate(int64_t s, const Part& part, int64_t r0, int64_t r1, bool carried, T* dsums) {
    const int64_t H = p_.hidden_size, t = time(s), before_d = d_ * seq_.rows();
    const int64_t row = before_d + seq_.row(t), state = d_ * seq_.batch * H;
    const int64_t y_row = p_.y.row, t_prev = carried ? time(s - 1) : 0;
    const int64_t first = first_unit(part.p0), last = least(first_unit(part.p1), H);
    const auto previous = [&](const T* initial, const T* all, int64_t stride) {
      if (carried) return RowsOf<const T>{all, stride};
      return initial ? RowsOf<const T>{initial + state, H} : RowsOf<const T>{shared_.zeros, 0};
    };
    const RowsOf<const T> h{p_.y.at(seq_, t) + d_ * H, y_row};
    const auto h_prev = previous(p_.h0, p_.y.at(seq_, t_prev) + d_ * H, y_row);
    const auto c_prev = previous(p_.c0, p_.cells + (before_d + seq_.row(t_prev)) * H, H);
    for (int64_t b = r0; b < r1; ++b) {
      const T* dy = p_.dy.data ? p_.dy.at(seq_, t) + b * p_.dy.row + d_ * H : nullptr;
      T* const dh = shared_.dh + b * shared_.state_stride;
      T* const dc = shared_.dc + b * shared_.state_stride;
      for (int64_t u = first; u < last; u += kLanes) {
        const int lanes = int(least<int64_t>(last - u, kLanes));
        V saved[Cell::kSaved + 1], prev[2], next[2], dnext[2], dprev[2], dsum[Cell::kSums];
        for (int k = 0; k < Cell::kSaved; ++k)
          saved[k] = V::load(p_.saved + ((row + b) * Cell::kSaved + k) * H + u, lanes);
        prev[0] = V::load(h_prev[b] + u, lanes);
        next[0] = V::load(h[b] + u, lanes);
        dnext[0] = V::load(dh + u);
        if (dy) dnext[0] = dnext[0] + V::load(dy + u, lanes);
        if constexpr (kHasC) {
          prev[1] = V::load(c_prev[b] + u, lanes);
          next[1] = V::load(p_.cells + (row + b) * H + u, lanes);
          dnext[1] = V::load(dc + u);
        }
        Cell::backward(saved, prev, next, dnext, dprev, dsum);
        for (int k = 0; k < Cell::kSums; ++k) dsum[k].store(dsums + b * stride_ + k * H + u, lanes);
        if (p_.flow_h) dnext[0].store(p_.flow_h + (row + b) * H + u, lanes);
        dprev[0].store(dh + u);
        if constexpr (kHasC) {
          if (p_.flow_c) dnext[1].store(p_.flow_c + (row + b) * H + u, lanes);
          dprev[1].store(dc + u);
        }
      }
    }
  }

  // The right operand dsums is multiplied by: packed, or as it lies if the call is too short to
  // repay packing. As it lies, its rows must fill whole vectors.
  template <class GateOf>
  struct Right {
    const Panels<T>& panels;
    const T* weight;
    T* packed;
    int first_sum;  // of the kGates sums that are its depth
    GateOf gate_of;
    bool lying;
  };
  auto input_weight() const {
    return right(inputs_, p_.weights[d_].ih, shared_.ih, Cell::kInputSum, Cell::input_gate);
  }
  auto hidden_weight() const {
    return right(units_, p_.weights[d_].hh, shared_.hh, Cell::kHiddenSum, Cell::hidden_gate);
  }
  template <class GateOf>
  Right<GateOf> right(const Panels<T>& panels, const T* weight, T* packed, int first_sum,
                      GateOf gate_of) const {
    const bool lying = plan_.direct && panels.units % kLanes == 0;
    return {panels, weight, packed, first_sum, gate_of, lying};
  }

  // Panels are walked in blocks of their depth, so that a block stays in the second-level cache
  // while all rows use it.
  static constexpr int64_t kDepthBlock = 512;

  // out += dsums W for some rows and a panel; rows of out are padded to whole vectors and begin
  // with the panel's first column.
  template <class GateOf>
  void add_product(const T* dsums, int64_t rows, const Right<GateOf>& w, int64_t panel, T* out,
                   int64_t out_row) const {
    const int64_t H = p_.hidden_size, depth = Cell::kGates * H, columns = w.panels.units;
    const int64_t step = w.panels.step(panel);
    dsums += w.first_sum * H;
    const auto add = [&](Term<T>* terms, int count) {
      for_row_tiles(rows, [&](int64_t r, int n) {
        Term<T> shifted[Cell::kGates];
        for (int i = 0; i < count; ++i) (shifted[i] = terms[i]).a += r * stride_;
        T* const to = out + r * out_row;
        product(n, w.panels.vectors(panel), shifted, count, Tile<T>{to, out_row, to, out_row});
      });
    };
    Term<T> terms[Cell::kGates];
    if (w.lying) {
      for (int s = 0; s < Cell::kGates; ++s)
        terms[s] = {dsums + s * H,
                    stride_,
                    1,
                    H,
                    w.weight + w.gate_of(s) * H * columns + w.panels.first_unit(panel),
                    columns};
      return add(terms, Cell::kGates);
    }
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      terms[0] = {dsums + k,
                  stride_,
                  1,
                  least(kDepthBlock, depth - k),
                  w.packed + w.panels.before(panel) * depth + k * step,
                  step};
      add(terms, 1);
    }
  }

  // dh += dsums W_hh, for the worker's rows below `active` and its units.
  void carry_back(int64_t s, const Part& part, int64_t active, const T* dsums) {
    for (int64_t i = part.p0; i < part.p1; ++i) {
      const int64_t panel = in_turn(i, s, part);
      add_product(dsums + part.b0 * stride_, active - part.b0, hidden_weight(), panel,
                  shared_.dh + part.b0 * shared_.state_stride + units_.first_unit(panel),
                  shared_.state_stride);
    }
  }

  ChunkGradients<T> chunk(int64_t begin, int64_t end, Team team) const {
    const int64_t t0 = least(time(begin), time(end - 1));
    return {seq_,           t0,           t0 + end - begin,  shared_.dsums, stride_,
            p_.hidden_size, Cell::kGates, end == seq_.steps, team,          buffer_};
  }

  // dx = dsums W_ih for the chunk, its rows split over the team.
  void input_gradient(const ChunkGradients<T>& chunk, Team team) {
    if (!dx_.data) return;
    const int64_t first = team.begin(chunk.rows()), count = team.end(chunk.rows()) - first;
    for (int64_t panel = 0; panel < inputs_.count(); ++panel) {
      const int64_t width = inputs_.step(panel), column = inputs_.first_unit(panel);
      std::memset(buffer_, 0, count * width * sizeof(T));
      add_product(shared_.dsums + first * stride_, count, input_weight(), panel, buffer_, width);
      add_tile(buffer_, int(width), count, p_.input_size - column,
               dx_.data + (seq_.row(chunk.t0) + first) * dx_.row + column, dx_.row, add_);
    }
  }

  void weight_gradients(const ChunkGradients<T>& chunk) {
    const WeightGrads<T>& g = p_.grads[d_];
    const int64_t I = p_.input_size;
    if (g.ih && I < kTileRows) {
      const bool even = seq_.offsets || p_.x.step == seq_.batch * p_.x.row;
      chunk.add_thin(g.ih, I, I, Cell::kInputSum, Cell::input_gate, even, [&](int64_t t) {
        return Term<T>{p_.x.at(seq_, t), 1, p_.x.row, 0, nullptr, 0};
      });
    } else if (g.ih) {
      chunk.add_to(g.ih, inputs_, Cell::kInputSum, Cell::input_gate,
                   [&](int64_t t, int64_t b) { return p_.x.at(seq_, t) + b * p_.x.row; });
    }
    if (g.hh) {
      const int64_t H = p_.hidden_size, back = d_ ? 1 : -1;
      chunk.add_to(g.hh, units_, Cell::kHiddenSum, Cell::hidden_gate,
                   [&](int64_t t, int64_t b) -> const T* {
                     const int64_t previous = t + back;
                     if (previous >= 0 && previous < seq_.steps && b < seq_.active(previous))
                       return p_.y.at(seq_, previous) + b * p_.y.row + d_ * H;
                     return p_.h0 ? p_.h0 + (d_ * seq_.batch + b) * H : shared_.zeros;
                   });
    }
    static constexpr T kOne = 1;  // a bias is the weight of an input that is always 1
    const auto ones = [&](int64_t) { return Term<T>{&kOne, 0, 0, 0, nullptr, 0}; };
    if (g.bias_ih) chunk.add_thin(g.bias_ih, 1, 1, Cell::kInputSum, Cell::input_gate, true, ones);
    if (g.bias_hh) chunk.add_thin(g.bias_hh, 1, 1, Cell::kHiddenSum, Cell::hidden_gate, true, ones);
  }

  const Backward<T>& p_;
  const Sequence seq_;
  const Plan& plan_;
  const int d_;
  const Shared& shared_;
  T* const buffer_;
  const Rows<T> dx_;
  const bool add_;
  const Panels<T> inputs_, units_;
  const int64_t stride_;
};

template <class Cell, class T>
void run_backward(const Backward<T>& p, const Plan& plan, const ParallelFor& parallel,
                  Workspace& workspace) {
  using Direction = BackwardDirection<Cell, T>;
  struct Call {
    const Backward<T>& p;
    const Plan& plan;
    typename Direction::Shared shared[kMaxDirections];
    T* panels;
    int64_t panel_size;
    T* dx;  // of the second direction, where both run at once

    Call(const Backward<T>& p, const Plan& plan, Arena arena, size_t* used = nullptr)
        : p(p),
          plan(plan),
          shared{{p, plan, arena, 0}, {p, plan, arena, 1}} {
      panel_size = Direction::panel_size(p, plan) + 16;
      panels = arena.take<T>(panel_size * plan.threads);
      dx = arena.take<T>(p.directions == 2 && p.dx.data ? p.sequence.rows() * p.input_size : 0);
      if (used) *used = arena.used();
    }

    void run(Team team) {
      T* const panel = panels + panel_size * team.rank;
      const auto direction = [&](int d, Team team, T* dx, bool add) {
        Direction(p, plan, d, shared[d], panel, {dx, p.dx.step, p.dx.row}, add).run(team);
      };
      if (p.directions == 2 && team.size % 2 == 0) {
        const int d = team.rank % 2;
        direction(d, team.half(), d && p.dx.data ? dx : p.dx.data, false);
        team.sync();
        if (p.dx.data) add_up(team);
      } else {
        for (int d = 0; d < p.directions; ++d) direction(d, team, p.dx.data, d > 0);
      }
    }

    // dx of both directions
    void add_up(Team team) {
      const int64_t count = p.sequence.rows() * p.input_size, end = team.end(count);
      for (int64_t i = team.begin(count); i < end; ++i) p.dx.data[i] += dx[i];
    }
  };
  run_call<Call>(p, plan, parallel, workspace);
}

}  // namespace rnnkern::RNNKERN_ISA
