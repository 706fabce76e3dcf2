// The backward pass of a layer, walked against time in chunks of steps.
//
// Within a chunk, per step: the cell turns the gradient of the states into gate gradients
// ("sums": gradients of the sums of the forward step), and dh of the step before is their product
// with W_hh (a projection comes first: projection.h). After a chunk, while its gate gradients are
// in the cache: dx, and the chunk's part of the weight gradients. Chunks do not depend on the
// number of threads, and a weight gradient is always summed by one thread in the same order.
#pragma once
#include "math.h"
#include "projection.h"
#include "walk.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class BackwardDirection {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kHasC = Cell::kStates > 1;
  static_assert(Cell::kGates <= kMaxGates);

 public:
  // Steps of the chunk, at most.
  static int64_t chunk_rows(const Backward<T>& p, const Plan& plan) {
    return least(plan.gradient_chunk, p.sequence.steps) * p.sequence.batch;
  }
  static int64_t sums_stride(const Backward<T>& p) {
    return odd_lines<T>(Cell::kSums * p.hidden_size);
  }

  // What the workers of a direction share.
  struct Shared {
    T *ih, *hh;        // packed weights
    T* dsums;          // (chunk rows, kSums H)
    RowsOf<T> dh, dc;  // B rows of R and H in whole vectors: gradients of the states, carried back
    T* zeros;
    BackwardProjection<Cell, T> projection;

    Shared(const Backward<T>& p, const Plan& plan, Arena& arena, int direction)
        : projection(p, plan, chunk_rows(p, plan), direction, arena) {
      if (direction >= p.directions) return;
      const Panels<T> inputs(p.input_size, 1), units(p.hidden_size, 1);
      const Panels<T> width = panels_of_h(p, plan);
      ih = arena.take<T>(inputs.size(Cell::kGates * p.hidden_size));
      hh = arena.take<T>(width.size(Cell::kGates * p.hidden_size));
      dsums = arena.take<T>(chunk_rows(p, plan) * sums_stride(p));
      dh.stride = odd_lines<T>(p.width());
      dh.data = arena.take<T>(p.sequence.batch * dh.stride);
      dc = {arena.take<T>(kHasC ? p.sequence.batch * units.row() : 0), units.row()};
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
        units_(p.hidden_size, 1),
        stride_(sums_stride(p)),
        ih_{{p.input_size, 1}, p.weights[direction].ih, shared.ih,  p.hidden_size,
            Cell::kGates,      Cell::input_gate,        plan.direct},
        hh_{panels_of_h(p, plan), p.weights[direction].hh, shared.hh,  p.hidden_size,
            Cell::kGates,         Cell::hidden_gate,       plan.direct} {}

  void run(Team team) {
    if (dx_.data) ih_.pack(team);
    hh_.pack(team);
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

  bool projects() const { return Cell::kProjects && p_.proj_size; }

  // Each rank's batch rows in row mode, or all; and its panels of a matrix's columns, or all.
  Part part(Team team, const Panels<T>& columns) const {
    const int64_t count = columns.count();
    if (plan_.by_units) return {0, seq_.batch, team.begin(count), team.end(count)};
    return {team.begin(seq_.batch), team.end(seq_.batch), 0, count};
  }

  // The carried gradients begin as those of the final states; a row that has not ended yet at a
  // step is not touched.
  void start(Team team) {
    const int64_t H = p_.hidden_size;
    if (team.rank == 0)
      for (int64_t u = 0; u < greatest(H, int64_t(kLanes)); ++u) shared_.zeros[u] = 0;
    const auto load = [&](const T* given, int64_t width, RowsOf<T> carried) {
      for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
        const T* from = given ? given + (d_ * seq_.batch + b) * width : nullptr;
        for (int64_t u = 0; u < carried.stride; ++u)
          carried[b][u] = from && u < width ? from[u] : 0;
      }
    };
    load(p_.dh_n, p_.width(), shared_.dh);
    if (kHasC) load(p_.dc_n, H, shared_.dc);
    if (projects()) shared_.projection.start(team);
  }

  void finish(Team team) const {
    const int64_t H = p_.hidden_size, R = p_.width();
    for (int64_t b = team.begin(seq_.batch); b < team.end(seq_.batch); ++b) {
      const int64_t state = d_ * seq_.batch + b;
      if (p_.dh_0) std::memcpy(p_.dh_0 + state * R, shared_.dh[b], R * sizeof(T));
      if (kHasC && p_.dc_0) std::memcpy(p_.dc_0 + state * H, shared_.dc[b], H * sizeof(T));
    }
  }

  // First row of step s in dsums, whose rows are in the order of the steps, or as packed.
  int64_t chunk_row(int64_t s, int64_t begin, int64_t end) const {
    if (!seq_.offsets) return (time(s) - least(time(begin), time(end - 1))) * seq_.batch;
    return seq_.row(time(s)) - seq_.row(least(time(begin), time(end - 1)));
  }

  void walk(int64_t begin, int64_t end, Team team) {
    const Part mine = part(team, units_), of_h = part(team, hh_.panels);
    for (int64_t s = end - 1; s >= begin; --s) {
      const int64_t active = least(seq_.active(time(s)), mine.b1);
      const int64_t before = s ? seq_.active(time(s - 1)) : 0;
      const int64_t carried = greatest(least(before, active), mine.b0);
      const int64_t row = chunk_row(s, begin, end);
      T* const dsums = shared_.dsums + row * stride_;
      if constexpr (Cell::kProjects)
        if (projects()) unproject(s, row, mine, of_h, active, team);
      if (mine.b0 < carried) differentiate(s, mine, mine.b0, carried, true, dsums);
      if (carried < active) differentiate(s, mine, carried, active, false, dsums);
      if (plan_.by_units) team.sync();
      if (mine.b0 < active) carry_back(s, of_h, active, dsums);
    }
  }

  // The adjoint of the projection: the cell's dh, for the worker's rows below `active`.
  void unproject(int64_t s, int64_t row, const Part& mine, const Part& of_h, int64_t active,
                 Team team) {
    const auto& projection = shared_.projection;
    const int64_t t = time(s), row_end = hh_.panels.row();
    const int64_t first = hh_.panels.first_unit(of_h.p0), last = hh_.panels.first_unit(of_h.p1);
    projection.take(t, row, mine.b0, active, first, least(last, row_end), shared_.dh);
    if (plan_.by_units) team.sync();
    if (mine.b0 < active)
      for (int64_t panel = mine.p0; panel < mine.p1; ++panel)
        projection.back(t, row, mine.b0, active, panel);
  }

  // The adjoint of the cell for batch rows [r0, r1) of step s.
  void differentiate(int64_t s, const Part& part, int64_t r0, int64_t r1, bool carried, T* dsums) {
    const int64_t H = p_.hidden_size, t = time(s), before_d = d_ * seq_.rows();
    const int64_t row = before_d + seq_.row(t), state = d_ * seq_.batch * H;
    const int64_t y_row = p_.y.row, t_prev = carried ? time(s - 1) : 0;
    const int64_t first = units_.first_unit(part.p0);
    const int64_t last = least(units_.first_unit(part.p1), H);
    const RowsOf<T> dh_rows = projects() ? shared_.projection.dm() : shared_.dh;
    const T* const dy_rows = projects() || !p_.dy.data ? nullptr : p_.dy.at(seq_, t) + d_ * H;
    T* const flow_h = projects() ? nullptr : p_.flow_h;
    const auto previous = [&](const T* initial, const T* all, int64_t stride) {
      if (carried) return RowsOf<const T>{all, stride};
      return initial ? RowsOf<const T>{initial + state, H} : RowsOf<const T>{shared_.zeros, 0};
    };
    const RowsOf<const T> h{p_.y.at(seq_, t) + d_ * H, y_row};
    const auto h_prev = previous(p_.h0, p_.y.at(seq_, t_prev) + d_ * H, y_row);
    const auto c_prev = previous(p_.c0, p_.cells + (before_d + seq_.row(t_prev)) * H, H);
    for (int64_t b = r0; b < r1; ++b) {
      const T* dy = dy_rows ? dy_rows + b * p_.dy.row : nullptr;
      T *const dh = dh_rows[b], *const dc = shared_.dc[b];
      for (int64_t u = first; u < last; u += kLanes) {
        const int lanes = int(least<int64_t>(last - u, kLanes));
        V saved[Cell::kSaved + 1], prev[2], next[2], dnext[2], dprev[2], dsum[Cell::kSums];
        for (int k = 0; k < Cell::kSaved; ++k)
          saved[k] = V::load(p_.saved + ((row + b) * Cell::kSaved + k) * H + u, lanes);
        if constexpr (!Cell::kProjects) {
          prev[0] = V::load(h_prev[b] + u, lanes);
          next[0] = V::load(h[b] + u, lanes);
        }
        dnext[0] = V::load(dh + u);
        if (dy) dnext[0] = dnext[0] + V::load(dy + u, lanes);
        if constexpr (kHasC) {
          prev[1] = V::load(c_prev[b] + u, lanes);
          next[1] = V::load(p_.cells + (row + b) * H + u, lanes);
          dnext[1] = V::load(dc + u);
        }
        Cell::backward(saved, prev, next, dnext, dprev, dsum);
        for (int k = 0; k < Cell::kSums; ++k) dsum[k].store(dsums + b * stride_ + k * H + u, lanes);
        if (flow_h) dnext[0].store(flow_h + (row + b) * H + u, lanes);
        dprev[0].store(dh + u);
        if constexpr (kHasC) {
          if (p_.flow_c) dnext[1].store(p_.flow_c + (row + b) * H + u, lanes);
          dprev[1].store(dc + u);
        }
      }
    }
  }

  // dh += dsums W_hh, for the worker's rows below `active` and its units.
  void carry_back(int64_t s, const Part& part, int64_t active, const T* dsums) {
    dsums += Cell::kHiddenSum * p_.hidden_size + part.b0 * stride_;
    for (int64_t i = part.p0; i < part.p1; ++i) {
      const int64_t panel = in_turn(i, s, part);
      hh_.add_product({dsums, stride_}, active - part.b0, panel,
                      {shared_.dh[part.b0] + hh_.panels.first_unit(panel), shared_.dh.stride});
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
    const T* dsums = shared_.dsums + first * stride_ + Cell::kInputSum * p_.hidden_size;
    for (int64_t panel = 0; panel < ih_.panels.count(); ++panel) {
      const int64_t width = ih_.panels.step(panel), column = ih_.panels.first_unit(panel);
      std::memset(buffer_, 0, count * width * sizeof(T));
      ih_.add_product({dsums, stride_}, count, panel, {buffer_, width});
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
      chunk.add_to(g.ih, ih_.panels, Cell::kInputSum, Cell::input_gate,
                   [&](int64_t t, int64_t b) { return p_.x.at(seq_, t) + b * p_.x.row; });
    }
    if (g.hh) {
      const int64_t R = p_.width(), back = d_ ? 1 : -1;
      chunk.add_to(g.hh, Panels<T>(R, 1), Cell::kHiddenSum, Cell::hidden_gate,
                   [&](int64_t t, int64_t b) -> const T* {
                     const int64_t previous = t + back;
                     if (previous >= 0 && previous < seq_.steps && b < seq_.active(previous))
                       return p_.y.at(seq_, previous) + b * p_.y.row + d_ * R;
                     return p_.h0 ? p_.h0 + (d_ * seq_.batch + b) * R : shared_.zeros;
                   });
    }
    if (projects()) shared_.projection.weight_gradient(chunk);
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
  const Panels<T> units_;
  const int64_t stride_;
  const RightOperand<T> ih_, hh_;
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
