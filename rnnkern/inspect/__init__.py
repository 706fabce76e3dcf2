"""What happens inside a call, for people: nothing that computes a result is here.

explain  which backend runs a call, and how the engine takes it
trace    gates, states and gradients of one call
watch    the same for every n-th training step of a model
"""
