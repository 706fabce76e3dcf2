// What a fiber is made of: a context to switch to, and a stack that cannot be overrun unnoticed.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <new>

namespace rnnkern::cuda::on_host {

// swapcontext saves the signal mask, two system calls for each switch.
#if defined(__x86_64__) && !defined(RNNKERN_UCONTEXT)
using Context = void**;  // the stack, with the registers on top

// noipa: the compiler must not conclude from the empty C++ body that registers survive the call.
[[gnu::naked, gnu::noipa]] inline void switch_context(Context& /*from*/, const Context& /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
      "mov %rsp, (%rdi); mov (%rsi), %rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void prepare(Context& context, char* stack_end, size_t /*bytes*/, void (*entry)()) {
  context = reinterpret_cast<void**>(stack_end) - 8;
  std::fill_n(context, 8, nullptr);  // six registers, `entry`, where it would return to
  context[6] = reinterpret_cast<void*>(entry);
}
#else
using Context = ucontext_t;

inline void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, char* stack_end, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack_end - bytes;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// The end of that many pages, with pages that cannot be touched before and after them. For good.
constexpr size_t kPages = 1 << 16;  // a multiple of the page size anywhere

inline char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes + 2 * kPages, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char* begin = static_cast<char*>(p) + kPages;
  if (p == MAP_FAILED || mprotect(begin, bytes, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  return begin + bytes;
}

}  // namespace rnnkern::cuda::on_host
