// The sizes of a call, read from the shapes of its tensors and checked against all of them, so that
// no kernel can read or write outside them. No torch, no NumPy: the bindings hand over plain shapes
// and a function that throws their own type of error.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "call_spec.h"
#include "cell_facts.h"
#include "prepacked.h"

namespace rnnkern {

// Throws the binding's error with this message.
using Fail = void (*)(const std::string& message);

struct Shape {
  const int64_t* sizes;
  int64_t rank;

  int64_t operator[](int64_t dim) const { return dim < rank ? sizes[dim] : 0; }  // 0 beyond
  bool is(std::initializer_list<int64_t> wanted) const {
    return std::equal(sizes, sizes + rank, wanted.begin(), wanted.end());
  }
};

// The places of a layer's weights for each direction, (w_ih, w_hh[, b_ih, b_hh][, w_hr][, params]),
// of a cell without a recurrent product (w_ih[, b_ih][, params]), of one whose input sums are given
// without w_ih and b_ih. -1: not there.
struct WeightPlaces {
  int ih = -1, hh = -1, bias_ih = -1, bias_hh = -1, hr = -1, params = -1, count = 0;

  explicit WeightPlaces(const CallSpec& spec) {
    const CellFacts* const facts = cell_facts(spec.cell);
    const bool recurs = !facts || facts->recurrent != Recurrent::none;
    const bool projects_input = !facts || facts->input == Input::dense;
    if (projects_input) ih = count++;
    if (recurs) hh = count++;
    if (spec.bias && projects_input) bias_ih = count++;
    if (spec.bias && recurs && !(facts && facts->normalizes_hidden)) bias_hh = count++;
    if (spec.projection) hr = count++;
    if (facts && facts->params) params = count++;
  }

  // Weights, WeightGrads or their like of pointer(place); null for what is not there.
  template <class Pointers, class F>
  Pointers pointers(F&& pointer) const {
    const auto at = [&](int place) { return place < 0 ? nullptr : pointer(place); };
    return {at(ih), at(hh), at(bias_ih), at(bias_hh), at(hr), at(params)};
  }
};

inline int weights_per_direction(const CallSpec& spec) { return WeightPlaces(spec).count; }

// H of a cell without a projection, as a direction's weights other than W_ih have it.
inline int64_t hidden_size_of(const CellFacts& facts, const WeightPlaces& places, const Shape* w) {
  if (facts.recurrent == Recurrent::dense) return w[places.hh][1];
  if (facts.recurrent == Recurrent::heads) return w[places.hh][0] * w[places.hh][2];
  return facts.input == Input::given ? w[places.params][1] : w[places.ih][0] / facts.gates;
}

// The features of an input that goes with a layer's weights.
inline int64_t input_size_of(const CallSpec& spec, const std::vector<Shape>& weights) {
  const CellFacts* const facts = cell_facts(spec.cell);
  const WeightPlaces places(spec);
  if (!facts || int64_t(weights.size()) < places.count) return 0;
  if (facts->input == Input::dense) return weights[places.ih][1];
  return spec.directions * facts->gates * hidden_size_of(*facts, places, weights.data());
}

// Whether prepacked weights have masks with them.
inline bool has_masks(const PrepackedHeader& header) { return header.masks_at > 0; }

// Whether prepacked weights are those of such a layer.
inline bool is_of(const PrepackedHeader& header, const CallSpec& spec, int64_t hidden_size,
                  int64_t proj_size) {
  return header.cell == spec.cell && header.directions == spec.directions &&
         header.hidden_size == hidden_size && header.proj_size == proj_size &&
         (proj_size > 0) == spec.projection;
}

// The shapes that a layer's weights had before they were packed.
class WeightShapes {
 public:
  WeightShapes(const CallSpec& spec, const PrepackedHeader& header) {
    const int64_t hidden_size = header.hidden_size, proj_size = header.proj_size;
    const CellFacts& facts = *cell_facts(header.cell);
    const int64_t rows = facts.gates * hidden_size, heads = header.heads;
    const WeightPlaces places(spec);
    const auto add = [&](std::initializer_list<int64_t> sizes) {
      sizes_.insert(sizes_.end(), sizes), ranks_.push_back(int64_t(sizes.size()));
      sizes_.resize(kMaxRank * ranks_.size());
    };
    for (int64_t d = 0; d < spec.directions; ++d) {
      if (places.ih >= 0) add({rows, header.input_size});
      if (facts.recurrent == Recurrent::dense) add({rows, proj_size ? proj_size : hidden_size});
      if (facts.recurrent == Recurrent::heads) add({heads, rows / heads, hidden_size / heads});
      if (places.bias_ih >= 0) add({rows});
      if (places.bias_hh >= 0) add({rows});
      if (spec.projection) add({proj_size, hidden_size});
      if (facts.params) add({facts.params, hidden_size});
    }
  }
  std::vector<Shape> shapes() const {
    std::vector<Shape> shapes;
    for (size_t i = 0; i < ranks_.size(); ++i) shapes.push_back({&sizes_[kMaxRank * i], ranks_[i]});
    return shapes;
  }

 private:
  static constexpr size_t kMaxRank = 3;
  std::vector<int64_t> sizes_, ranks_;
};

class CallShape {
 public:
  static constexpr int kMaxStates = 2, kMaxWeights = 2 * 5;

  CellId cell;
  int gates, saved_values, params;
  bool has_c, bias, packed, batch_first;
  int directions;
  WeightPlaces places;
  int64_t steps, batch, rows, input_size, hidden_size;
  int64_t proj_size, width;      // P, 0 without a projection; R, of h
  int64_t heads;                 // blocks of W_hh: 1 if it is dense, 0 if there is none
  int64_t c_width;               // of c: the values of all states but h, H each
  std::vector<int64_t> offsets;  // packed: the first row of each step, and their number

  // The numbers of weights and states come first: read() looks at as many shapes.
  // `masks`: whether the caller gives them.
  CallShape(const CallSpec& spec, bool packed, size_t weights, size_t states, Fail fail,
            bool masks = false)
      : cell(CellId(spec.cell)),
        bias(spec.bias),
        packed(packed),
        batch_first(spec.batch_first && !packed),
        directions(int(spec.directions)),
        places(spec),
        projection_(spec.projection),
        states_(int(states)),
        fail_(fail) {
    const CellFacts* const facts = cell_facts(spec.cell);
    require(facts, [&] { return "no cell " + std::to_string(spec.cell); });
    gates = facts->gates, saved_values = facts->saved, params = facts->params;
    facts_ = facts, recurrent_ = facts->recurrent;
    masks_ = facts->masks;
    require(masks == (masks_ > 0), [&] {
      return masks ? std::string("the cell takes no masks")
                   : "the cell takes " + std::to_string(masks_) + " masks, and none are given here";
    });
    c_values_ = facts->states - 1, has_c = c_values_ > 0;
    require(spec.directions == 1 || spec.directions == 2,
            [&] { return "expected 1 or 2 directions, got " + std::to_string(spec.directions); });
    require(facts->projects || !projection_,
            [] { return std::string("only LSTM has a projection"); });
    const size_t wanted = directions * places.count, wanted_states = has_c ? 2 : 1;
    require(weights == wanted, [&] { return expected(wanted, "weights", weights); });
    require(states == 0 || states == wanted_states,
            [&] { return expected(wanted_states, "states", states); });
  }

  // `batch_sizes`: `step_count` of them, for packed data.
  void read(const Shape& input, const Shape* state, const Shape* weights,
            const int64_t* batch_sizes = nullptr, int64_t step_count = 0) {
    const int rank = packed ? 2 : 3;
    require(input.rank == rank, [&] { return "input must have " + expected_rank(rank, input); });
    input_size = input[rank - 1];
    read_sizes(weights, state);
    c_width = c_values_ * hidden_size;
    if (packed) {
      read_offsets(batch_sizes, step_count, input[0]);
    } else {
      steps = input[batch_first ? 1 : 0];
      batch = input[batch_first ? 0 : 1];
      rows = steps * batch;
    }
    if (steps <= 0) fail_("Expected sequence length to be larger than 0 in RNN");
    check_weights(weights);
    for (int i = 0; i < states_; ++i)
      check(state[i], state_name(i), {directions, batch, i ? c_width : width});
  }

  void check(const Shape& shape, const char* name, std::initializer_list<int64_t> wanted) const {
    require(shape.is(wanted), [&] {
      std::string message = std::string(name) + " must have the sizes";
      for (int64_t size : wanted) message.append(" ").append(std::to_string(size));
      message += ", got";
      for (int64_t i = 0; i < shape.rank; ++i)
        message.append(" ").append(std::to_string(shape.sizes[i]));
      return message;
    });
  }

  // output and its gradient, as the caller sees them.
  void check_output(const Shape& shape, const char* name) const {
    const int64_t features = directions * width;
    if (packed) return check(shape, name, {rows, features});
    check(shape, name, {batch_first ? batch : steps, batch_first ? steps : batch, features});
  }

  int64_t saved_size() const { return units() * saved_values; }
  int64_t c_states_size() const { return c_values_ * units(); }
  void check_saved(int64_t saved, int64_t c_states) const {
    require(saved == saved_size() && c_states == c_states_size(),
            [] { return std::string("the forward pass was not run with train=True"); });
  }

  // A mask of resets, and the states after them: of all states or of none.
  void check_resets(const Shape& mask, const Shape* state, size_t states) const {
    require(!packed && directions == 1,
            [] { return std::string("resets are for padded data in one direction"); });
    const size_t wanted = has_c ? 2 : 1;
    require(states == 0 || states == wanted,
            [&] { return expected(wanted, "states after resets", states); });
    const int64_t first = batch_first ? batch : steps, second = batch_first ? steps : batch;
    check(mask, "resets", {first, second});
    for (int i = 0; i < int(states); ++i) {
      const int64_t features = i ? c_width : width;
      if (state[i].rank == 4)
        check(state[i], reset_name(i), {directions, first, second, features});
      else
        check(state[i], reset_name(i), {directions, batch, features});
    }
  }

  // (D, T, B, kMasks, H), with batch_first (D, B, T, kMasks, H), packed (D, rows, kMasks, H).
  void check_masks(const Shape& masks) const {
    if (packed) return check(masks, "masks", {directions, rows, masks_, hidden_size});
    const int64_t first = batch_first ? batch : steps, second = batch_first ? steps : batch;
    check(masks, "masks", {directions, first, second, masks_, hidden_size});
  }

  // Those of all steps and rows, for prepacked weights.
  void check_constant_masks(const Shape& masks) const {
    check(masks, "masks", {masks_, hidden_size});
  }

  static const char* reset_name(int i) { return i ? "reset_c" : "reset_h"; }
  static const char* state_name(int i) { return i ? "the state c_0" : "the state h_0"; }
  // Of a direction's i-th weight.
  const char* weight_name(int i) const {
    if (i == places.hh) return "weight_hh";
    if (i == places.bias_ih) return "bias_ih";
    if (i == places.bias_hh) return "bias_hh";
    if (i == places.hr) return "weight_hr";
    return i == places.params ? "params" : "weight_ih";
  }

 private:
  template <class Message>
  void require(bool condition, Message&& message) const {
    if (!condition) fail_("rnnkern: " + message());
  }
  static std::string expected(size_t wanted, const char* what, size_t got) {
    return "expected " + std::to_string(wanted) + " " + what + ", got " + std::to_string(got);
  }
  static std::string expected_rank(int wanted, const Shape& got) {
    return std::to_string(wanted) + " dimensions, got " + std::to_string(got.rank);
  }

  int64_t units() const { return directions * rows * hidden_size; }

  // H, P and R.
  void read_sizes(const Shape* weights, const Shape* state) {
    heads = recurrent_ == Recurrent::none ? 0 : 1;
    if (recurrent_ == Recurrent::heads) heads = weights[places.hh][0];
    width = width_of(weights);
    hidden_size = projection_ ? weights[places.hr][1] : width;
    const bool agrees = places.ih < 0 ? input_size == directions * gates * hidden_size
                                      : weights[places.ih][0] == gates * hidden_size;
    if (!agrees || (projection_ && weights[places.hr][0] != width)) settle_sizes(weights, state);
    proj_size = projection_ ? width : 0;
    require(!projection_ || (0 < proj_size && proj_size < hidden_size),
            [] { return std::string("proj_size has to be smaller than hidden_size"); });
  }

  // R, as a direction's weights have it.
  int64_t width_of(const Shape* w) const { return hidden_size_of(*facts_, places, w); }

  // Where the tensors contradict each other: the sizes that most of them speak for, so that the
  // checks name the one that is wrong.
  void settle_sizes(const Shape* weights, const Shape* state) {
    std::vector<int64_t> hidden, widths;
    for (int d = 0; d < directions; ++d) {
      const Shape* w = &weights[d * places.count];
      for (int i : {places.ih, places.bias_ih, places.bias_hh})
        if (i >= 0) hidden.push_back(w[i][0] / gates);
      hidden.push_back(projection_ ? w[places.hr][1] : width_of(w));
      widths.push_back(width_of(w));
      if (projection_) widths.push_back(w[places.hr][0]);
    }
    for (int i = 0; i < states_; ++i)
      (projection_ && i == 0 ? widths : hidden).push_back(state[i][2] / (i ? c_values_ : 1));
    hidden_size = majority(hidden);
    width = projection_ ? majority(widths) : hidden_size;
  }

  // The first of the most frequent ones.
  static int64_t majority(const std::vector<int64_t>& sizes) {
    const auto frequency = [&](int64_t size) {
      return std::count(sizes.begin(), sizes.end(), size);
    };
    return *std::max_element(sizes.begin(), sizes.end(),
                             [&](int64_t a, int64_t b) { return frequency(a) < frequency(b); });
  }

  void read_offsets(const int64_t* sizes, int64_t count, int64_t given_rows) {
    steps = count;
    offsets.resize(steps + 1);
    batch = steps ? sizes[0] : 0;
    for (int64_t t = 0; t < steps; ++t) {
      require(sizes[t] >= 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
              [] { return std::string("batch_sizes must not grow"); });
      offsets[t + 1] = offsets[t] + sizes[t];
    }
    rows = offsets[steps];
    require(rows == given_rows, [&] {
      return "batch_sizes add up to " + std::to_string(rows) + " rows, but the data has " +
             std::to_string(given_rows);
    });
  }

  void check_weights(const Shape* weights) const {
    const int64_t gate_rows = gates * hidden_size;
    require(recurrent_ != Recurrent::heads || (heads > 0 && hidden_size % heads == 0), [&] {
      return "weight_hh must have the sizes heads, rows and columns of a head's matrix, and " +
             std::to_string(hidden_size) + " units be a multiple of heads, got " +
             std::to_string(heads) + " heads";
    });
    require(places.ih >= 0 || input_size == directions * gate_rows, [&] {
      return "input must have the sums of all gates, " + std::to_string(directions * gate_rows) +
             " features, got " + std::to_string(input_size);
    });
    for (int d = 0; d < directions; ++d) {
      const Shape* w = &weights[d * places.count];
      if (places.ih >= 0) check(w[places.ih], "weight_ih", {gate_rows, input_size});
      if (recurrent_ == Recurrent::dense) check(w[places.hh], "weight_hh", {gate_rows, width});
      if (recurrent_ == Recurrent::heads)
        check(w[places.hh], "weight_hh", {heads, gate_rows / heads, hidden_size / heads});
      for (int i : {places.bias_ih, places.bias_hh})
        if (i >= 0) check(w[i], weight_name(i), {gate_rows});
      if (projection_) check(w[places.hr], "weight_hr", {proj_size, hidden_size});
      if (params) check(w[places.params], "params", {params, hidden_size});
    }
  }

  bool projection_;
  const CellFacts* facts_;
  Recurrent recurrent_;
  int states_;    // given
  int c_values_;  // states besides h
  int masks_;     // of the cell
  Fail fail_;
};

}  // namespace rnnkern
