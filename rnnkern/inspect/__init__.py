"""What happens inside a call, for people: nothing that computes a result is here.

explain   which backend runs a call, and how the engine takes it
record    one layer's call as the kernels left it, and the layout of its steps
results   what trace and gradient_flow return
recorder  the observer that keeps a call
trace     gates, states and gradients of one call
watch     the same for every n-th training step of a model
"""
