// A call of the backward pass: its directions, their blocks of rows, and the threads that run them.
#pragma once
#include "backward_block.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class BackwardCall {
  using S = Acc<T>;
  using Block = BackwardBlock<Cell, T>;
  static constexpr bool kGiven = Products<Cell>::kGiven;  // each direction has columns of its own

 public:
  BackwardCall(const BackwardParams<T>& p, const Plan& plan, Arena arena, size_t* used = nullptr)
      : p_(p),
        plan_(plan),
        shared_{{p, plan, arena, 0}, {p, plan, arena, 1}} {
    for (int block = 0; block < plan.blocks(p.sequence.batch); ++block) {
      Arena count(nullptr);
      Block(p, plan, 0, block, shared_[0], count, nullptr, {}, false);
      scratch_size_ = max(scratch_size_, int64_t(count.used()));
    }
    scratches_ = arena.alloc<char>(scratch_size_ * max(plan.threads, p.directions));
    buffer_size_ = Block::buffer_size(p, plan);
    buffers_ = arena.alloc<S>(buffer_size_ * plan.threads);
    const bool both_dx = p.directions == 2 && p.dx.data && !kGiven;
    if (both_dx) dx_ = arena.alloc<S>(p.sequence.rows() * p.input_size);
    if (used) *used = arena.used();
  }

  void run(Team team) {
    if (p_.directions == 2 && team.size % 2 == 0) {
      const int d = team.rank % 2;
      direction(d, team.half(), team.rank, d && dx_ ? dx_ : p_.dx.data, false);
      team.sync();
      if (dx_) add_dx(team);
    } else {
      for (int d = 0; d < p_.directions; ++d) direction(d, team, team.rank, p_.dx.data, d > 0);
    }
  }

 private:
  // The blocks of a direction: one thread each where there are enough, else all together.
  void direction(int d, Team team, int worker, S* dx, bool accumulate_dx) {
    shared_[d].pack(p_, team);
    team.sync();
    const int blocks = plan_.blocks(p_.sequence.batch);
    const bool alone = !plan_.split_units && blocks >= team.size;
    for (int next = 0; (next = alone ? shared_[d].next++ : next) < blocks; ++next) {
      Arena scratch(scratches_ + scratch_size_ * (alone ? worker : d));
      Block(p_, plan_, d, next, shared_[d], scratch, buffers_ + buffer_size_ * worker,
            {dx, p_.dx.t_stride, p_.dx.b_stride}, accumulate_dx)
          .run(alone ? Team{0, 1, nullptr} : team);
    }
    if (alone) team.sync();
    shared_[d].reduce_wgrad(p_, plan_, team);
  }

  // dx of both directions, which ran at once.
  void add_dx(Team team) {
    const int64_t count = p_.sequence.rows() * p_.input_size, end = team.end(count);
    for (int64_t i = team.begin(count); i < end; ++i) p_.dx.data[i] += dx_[i];
  }

  const BackwardParams<T>& p_;
  const Plan& plan_;
  BackwardShared<Cell, T> shared_[kMaxDirections];
  char* scratches_;           // one per block in progress
  int64_t scratch_size_ = 0;  // of the largest block
  S* buffers_;                // one per thread
  int64_t buffer_size_;
  S* dx_ = nullptr;  // of the second direction, where both run at once and share x's columns
};

template <class Cell, class T>
void run_backward(const BackwardParams<T>& p, const Plan& plan, const ParallelFor& parallel,
                  Workspace& workspace) {
  run_on_team<BackwardCall<Cell, T>>(p, plan, parallel, workspace);
}

}  // namespace rnnkern::RNNKERN_ISA
