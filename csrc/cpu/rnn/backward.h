// A call of the backward pass: its directions, their blocks of rows, and who walks them.
#pragma once
#include "backward_block.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
void run_backward(const BackwardParams<T>& p, const Plan& plan, const ParallelFor& parallel,
                  Workspace& workspace) {
  using Block = BackwardBlock<Cell, T>;
  struct Call {
    const BackwardParams<T>& p;
    const Plan& plan;
    BackwardShared<Cell, T> shared[kMaxDirections];
    char* scratches;  // for a block each
    int64_t scratch_size;
    Acc<T>* buffers;  // for a thread each
    int64_t buffer_size;
    Acc<T>* dx;  // of the second direction, where both run at once

    Call(const BackwardParams<T>& p, const Plan& plan, Arena arena, size_t* used = nullptr)
        : p(p),
          plan(plan),
          shared{{p, plan, arena, 0}, {p, plan, arena, 1}} {
      Arena count(nullptr);
      Block(p, plan, 0, 0, shared[0], count, nullptr, {}, false);
      scratch_size = count.used();
      scratches = arena.alloc<char>(scratch_size * max(plan.threads, p.directions));
      buffer_size = Block::buffer_size(p, plan);
      buffers = arena.alloc<Acc<T>>(buffer_size * plan.threads);
      dx = arena.alloc<Acc<T>>(p.directions == 2 && p.dx.data ? p.sequence.rows() * p.input_size
                                                              : 0);
      if (used) *used = arena.used();
    }

    // The blocks of a direction: taken by one thread each while there are enough of them.
    void direction(int d, Team team, int worker, Acc<T>* dx, bool add) {
      shared[d].pack(p, team);
      team.sync();
      const int blocks = plan.blocks(p.sequence.batch);
      const bool alone = !plan.split_units && blocks >= team.size;
      for (int next = 0; (next = alone ? shared[d].next++ : next) < blocks; ++next) {
        Arena scratch(scratches + scratch_size * (alone ? worker : d));
        Block(p, plan, d, next, shared[d], scratch, buffers + buffer_size * worker,
              {dx, p.dx.t_stride, p.dx.b_stride}, add)
            .run(alone ? Team{0, 1, nullptr} : team);
      }
      if (alone) team.sync();
      shared[d].gate_gemm(p, plan, team);
    }

    void run(Team team) {
      if (p.directions == 2 && team.size % 2 == 0) {
        const int d = team.rank % 2;
        direction(d, team.half(), team.rank, d && p.dx.data ? dx : p.dx.data, false);
        team.sync();
        if (p.dx.data) gate_gemm(team);
      } else {
        for (int d = 0; d < p.directions; ++d) direction(d, team, team.rank, p.dx.data, d > 0);
      }
    }

    // dx of both directions
    void gate_gemm(Team team) {
      const int64_t count = p.sequence.rows() * p.input_size, end = team.end(count);
      for (int64_t i = team.begin(count); i < end; ++i) p.dx.data[i] += dx[i];
    }
  };
  run_on_team<Call>(p, plan, parallel, workspace);
}

}  // namespace rnnkern::RNNKERN_ISA
