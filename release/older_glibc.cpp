// Makes a library load under glibc 2.28 and GCC 8's libstdc++, the ABI of manylinux_2_28: the
// linker takes the newest version of each symbol that the machine has. build_wheel.py links this
// file into every library of a wheel; a build from source does without.
#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <sstream>
#include <string>

#define RNNKERN_HIDDEN __attribute__((visibility("hidden")))
#ifdef __x86_64__
#define RNNKERN_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define RNNKERN_FIRST_GLIBC "GLIBC_2.17"
#endif

extern "C" {

// glibc 2.32; libstdc++ leaves out atomic instructions while it is true.
RNNKERN_HIDDEN char __libc_single_threaded = 0;

// glibc 2.34 moved these from libpthread to libc, under a new version. By the linker's --wrap=NAME
// a call of NAME is one of __wrap_NAME.
int older_once(pthread_once_t*, void (*)());
__asm__(".symver older_once, pthread_once@" RNNKERN_FIRST_GLIBC);
RNNKERN_HIDDEN int __wrap_pthread_once(pthread_once_t* once, void (*function)()) {
  return older_once(once, function);
}

int older_trylock(pthread_mutex_t*);
__asm__(".symver older_trylock, pthread_mutex_trylock@" RNNKERN_FIRST_GLIBC);
RNNKERN_HIDDEN int __wrap_pthread_mutex_trylock(pthread_mutex_t* mutex) {
  return older_trylock(mutex);
}

// std::condition_variable::wait; GCC 12 gave it a new version (GLIBCXX_3.4.30).
void older_wait(std::condition_variable*, std::unique_lock<std::mutex>&);
__asm__(
    ".symver older_wait, "
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
RNNKERN_HIDDEN void __wrap__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(
    std::condition_variable* variable, std::unique_lock<std::mutex>& lock) {
  older_wait(variable, lock);
}

// std::__throw_bad_array_new_length, GCC 11 (GLIBCXX_3.4.29).
[[noreturn]] RNNKERN_HIDDEN void __wrap__ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_array_new_length();
}

// Forms that C++20 added (GLIBCXX_3.4.26 and 29). libtorch exports copies of its own, which would
// hide them from the linker and from auditwheel.
void older_ostringstream(std::ostringstream*, std::ios_base::openmode) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1ESt13_Ios_Openmode");
RNNKERN_HIDDEN void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(
    std::ostringstream* stream) {
  older_ostringstream(stream, std::ios_base::out);
}

}  // extern "C"

std::string older_str(const std::stringbuf*) __asm__(
    "_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
RNNKERN_HIDDEN std::string str_of_lvalue(const std::stringbuf*) __asm__(
    "__wrap__ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
RNNKERN_HIDDEN std::string str_of_rvalue(std::stringbuf*) __asm__(
    "__wrap__ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string str_of_lvalue(const std::stringbuf* buffer) { return older_str(buffer); }
std::string str_of_rvalue(std::stringbuf* buffer) { return older_str(buffer); }

// What eh_ptr.o, libstdc++'s own object for std::exception_ptr, needs of what libstdc++ hides.
namespace __cxxabiv1 {
[[noreturn]] RNNKERN_HIDDEN void __terminate(std::terminate_handler handler) noexcept {
  handler();
  std::abort();
}
}  // namespace __cxxabiv1
