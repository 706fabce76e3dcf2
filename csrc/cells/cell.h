// What a cell is, the defaults that most cells share, and the one macro its functions need.
//
// A cell is a struct of constants and two static functions, nothing else: no pointers into
// tensors, no indices, no threads. Both engines are templates over it; V is one SIMD vector of
// hidden units on the CPU and one float or double in a CUDA thread.
//
//   kGates        gates per unit: the weights have kGates * H rows, in torch's order
//   kGateNames    their names, in torch's order
//   kPreacts      pre-activations per unit. The input and the recurrent product of a gate share
//                 one where they only meet in a sum. GRU's new gate multiplies the recurrent
//                 product by r first, so it needs two.
//   kInput        what the gates take of the input: Input::dense, W_ih x + b_ih, or Input::given,
//                 sums that the caller computes: x then has kGates * H columns for each direction
//   kInputPreact  first of the kGates consecutive pre-activations that take W_ih x + b_ih
//   kHiddenPreact first of the kGates consecutive pre-activations that take W_hh h + b_hh, if there
//                 is a W_hh
//   input_gate(s), hidden_gate(s)
//                 the gate, in torch's order, of the s-th of those consecutive pre-activations
//   kStates       states per unit: h, which W_hh multiplies and the layer puts out, and others
//   kStateNames   their names, h first
//   kRecurrent    what W_hh is: Recurrent::dense, heads or none
//   kNormalizesHidden
//                 whether a row's W_hh h is standardised over all gates and units, as in layer
//                 normalisation: then there is no b_hh, and the last kGates + 1 saved values are
//                 the engine's: the standardised sums and their scale
//   kNormalizedState
//                 a state that is standardised over the units before h is made of it, or 0
//   kNormEpsilon  what both add to a variance
//   kSaved        values per unit that backward needs besides the states
//   kSavedNames   their names; those of gates are the gates' own
//   kParams       learned values per unit, as a peephole's weights: params (kParams, H)
//   kParamNames   their names
//   kMasks        values per unit and step that the caller gives and nothing learns, as zoneout's:
//                 masks (T, B, kMasks, H)
//   kMaskNames    their names
//   kMasksHidden  whether h is multiplied by the last mask before W_hh multiplies it
//   kProjects     whether h may be projected before it is handed on (torch.nn.LSTM's proj_size).
//                 Such a cell reads neither prev[0] nor, in backward, next[0], and has a third
//                 function, hidden(saved, next): next[0] as forward made it, once more.
//
//   forward(preact[kPreacts], prev[kStates], next[kStates], saved[kSaved])
//       one step: the states after it, and what backward needs.
//   backward(saved, prev, next, dnext[kStates], dprev[kStates], dgates[kPreacts])
//       the adjoint. dnext are the derivatives of the loss by the states after the step, each by
//       what uses it later; where a state also feeds another of the same step (LSTM's c feeds h)
//       its part is added, so that dnext holds total derivatives afterwards. dprev[0] leaves out
//       what flows through W_hh (the engine adds it).
//       Without a W_hh a cell's own equations may still read prev[0], as a diagonal W_hh does: its
//       learned value per unit times prev[0] (IndRNN).
//   With kParams > 0:
//   forward(preact, prev, params[kParams], next, saved)
//   backward(saved, prev, params, next, dnext, dprev, dgates, dparams[kParams])
//       dparams of this row and step alone: the engine sums them.
//   With kMasks > 0, masks[kMasks] come after prev or params, in both.
//   With kNormalizedState > 0:
//   output(held, norm, params) -> h
//       of the standardised state and of what forward left in next[0].
//   output_backward(saved, norm, params, dh) -> the derivative of the loss by norm
//       backward then finds norm in next[kNormalizedState], and the whole derivative of that state
//       in dnext[kNormalizedState].
//
// The engine brings sigmoid(V), tanh(V), relu(V), exp(V), log(V), softplus(V), log_sigmoid(V),
// max(V, V) and where_positive(V x, V y) (0 where x <= 0, else y, as for NaN), the operators
// + - * /, and V(scalar).
//
// limits.h says which cells the engines take.
#pragma once

#if defined(__CUDACC__)
#define RNNKERN_HD __host__ __device__ __forceinline__
#else
#define RNNKERN_HD inline __attribute__((always_inline))
#endif

namespace rnnkern {

// What W_hh is.
enum class Recurrent {
  dense,  // (G H, H)
  heads,  // (heads, G H / heads, H / heads): each head of units has a matrix of its own
  none,   // there is no W_hh and no b_hh: gates take W_ih x + b_ih alone
};

// Where the input's sums come from.
enum class Input {
  dense,  // W_ih x + b_ih, W_ih (G H, I)
  given,  // the caller: there is no W_ih and no b_ih
};

// A cell derives from it and declares anew what differs.
struct CellDefaults {
  using Recurrent = rnnkern::Recurrent;
  using Input = rnnkern::Input;
  static constexpr Input kInput = Input::dense;
  static constexpr Recurrent kRecurrent = Recurrent::dense;
  static constexpr int kInputPreact = 0, kHiddenPreact = 0, kParams = 0, kMasks = 0;
  static constexpr bool kNormalizesHidden = false, kMasksHidden = false;
  static constexpr int kNormalizedState = 0;
  static constexpr double kNormEpsilon = 1e-5;
  static constexpr const char* const* kSavedNames = nullptr;
  static constexpr const char* const* kParamNames = nullptr;
  static constexpr const char* const* kMaskNames = nullptr;
  static constexpr bool kProjects = false;
  static constexpr int input_gate(int s) { return s; }
  static constexpr int hidden_gate(int s) { return s; }
};

}  // namespace rnnkern
