// The library of autograd for one torch and one Python, as one translation unit: most of the time
// of compiling any of these files goes into torch's headers.
#include "autograd.cpp"
#include "autograd_module.cpp"
#include "direct_call.cpp"
#include "module_weights.cpp"
#include "plain_call.cpp"
#include "plain_module.cpp"
