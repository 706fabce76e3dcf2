// The CPU engine on NumPy arrays: no torch. The arguments mean what those of the torch operators
// mean (torch_ops.cpp); rnnkern/numpy.py is the public face and has checked the sizes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../core/weight_list.h"
#include "../cpu/engine.h"

namespace py = pybind11;

namespace {

using rnnkern::CellId;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr rnnkern::ParallelFor kThreads{
    [](int count, void (*body)(void*, int, int), void* context) {
      std::vector<std::thread> threads;
      for (int i = 1; i < count; ++i) threads.emplace_back(body, context, i, i + 1);
      body(context, 0, 1);
      for (std::thread& t : threads) t.join();
    }};

int g_threads = int(std::max(1u, std::thread::hardware_concurrency()));

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
struct Call {
  CellId cell;
  int gates, saved_values;
  bool has_c, bias, packed, batch_first;
  int64_t directions, per_direction, steps, batch, rows, input_size, hidden_size, proj_size, width;
  std::vector<int64_t> offsets;

  Call(const Array<T>& input, const std::optional<std::vector<int64_t>>& batch_sizes,
       const std::vector<Array<T>>& state, const std::vector<Array<T>>& weights, int cell_id,
       bool batch_first_)
      : cell(CellId(cell_id)),
        packed(batch_sizes),
        batch_first(batch_first_ && !packed) {
    require(cell_id >= 0 && cell_id < rnnkern::kCellCount, "no such cell");
    rnnkern::visit_cell(
        cell, [&](auto c) { gates = c.kGates, saved_values = c.kSaved, has_c = c.kStates > 1; });
    require(weights.size() >= 2 && weights[1].ndim() == 2, "expected weights");
    const rnnkern::WeightList list(int(weights.size()),
                                   weights.size() > 2 && weights[2].ndim() == 1);
    require(list.fits(int(weights.size())), "unexpected number of weights");
    bias = list.bias, per_direction = list.per_direction, directions = list.directions;
    require(input.ndim() == (packed ? 2 : 3), "input has the wrong number of dimensions");
    input_size = input.shape(input.ndim() - 1);
    width = hidden_size = weights[1].shape(1);
    proj_size = 0;
    if (list.projection) {
      const auto& w_hr = weights[per_direction - 1];
      require(cell == CellId::lstm && w_hr.ndim() == 2, "only LSTM has a projection, a matrix");
      proj_size = width, hidden_size = w_hr.shape(1);
      require(0 < proj_size && proj_size < hidden_size, "weight_hr has the wrong shape");
    }
    if (packed) {
      offsets.push_back(0);
      for (int64_t size : *batch_sizes) {
        require(size >= 0 && (offsets.size() == 1 || size <= offsets.back() - offsets.end()[-2]),
                "batch_sizes must not grow");
        offsets.push_back(offsets.back() + size);
      }
      steps = int64_t(batch_sizes->size());
      batch = steps ? (*batch_sizes)[0] : 0;
      rows = offsets.back();
      require(rows == input.shape(0), "batch_sizes do not add up to the rows of input");
    } else {
      steps = input.shape(batch_first ? 1 : 0);
      batch = input.shape(batch_first ? 0 : 1);
      rows = steps * batch;
    }
    require(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    for (int64_t d = 0; d < directions; ++d) {
      const auto* w = &weights[d * per_direction];
      require(has(w[0], {gates * hidden_size, input_size}), "weight_ih has the wrong shape");
      require(has(w[1], {gates * hidden_size, width}), "weight_hh has the wrong shape");
      require(!bias || (has(w[2], {gates * hidden_size}) && has(w[3], {gates * hidden_size})),
              "a bias has the wrong shape");
      require(!proj_size || has(w[per_direction - 1], {proj_size, hidden_size}),
              "weight_hr has the wrong shape");
    }
    require(state.empty() || state.size() == (has_c ? 2u : 1u), "unexpected number of states");
    for (size_t i = 0; i < state.size(); ++i)
      require(has(state[i], {directions, batch, i ? hidden_size : width}),
              "a state has the wrong shape");
  }

  static bool has(const Array<T>& a, std::initializer_list<int64_t> shape) {
    return a.ndim() == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), a.shape());
  }

  template <class U>
  rnnkern::SequenceView<U> rows_of(U* data, int64_t features) const {
    if (batch_first) return {data, features, steps * features};
    return {data, batch * features, features};
  }

  std::vector<int64_t> row_shape(int64_t features) const {
    if (packed) return {rows, features};
    if (batch_first) return {batch, steps, features};
    return {steps, batch, features};
  }

  void fill(rnnkern::LayerParams<T>& p, const Array<T>& input, const std::vector<Array<T>>& state,
            const std::vector<Array<T>>& weights) const {
    p.cell = cell;
    p.sequence = {steps, batch, packed ? offsets.data() : nullptr};
    p.input_size = input_size;
    p.hidden_size = hidden_size;
    p.proj_size = proj_size;
    p.directions = int(directions);
    p.x = rows_of(input.data(), input_size);
    for (int64_t d = 0; d < directions; ++d) {
      const auto* w = &weights[d * per_direction];
      p.weights[d] = {w[0].data(), w[1].data(), bias ? w[2].data() : nullptr,
                      bias ? w[3].data() : nullptr,
                      proj_size ? w[per_direction - 1].data() : nullptr};
    }
    p.h0 = state.empty() ? nullptr : state[0].data();
    p.c0 = state.size() < 2 ? nullptr : state[1].data();
  }
};

template <class T>
T* data_or_null(Array<T>& a) {
  return a.size() ? a.mutable_data() : nullptr;
}

template <class T>
py::tuple forward(Array<T> input, std::optional<std::vector<int64_t>> batch_sizes,
                  std::vector<Array<T>> state, std::vector<Array<T>> weights, int cell,
                  bool batch_first, bool train) {
  const Call<T> call(input, batch_sizes, state, weights, cell, batch_first);
  const int64_t D = call.directions, B = call.batch, H = call.hidden_size, R = call.width;
  Array<T> output(call.row_shape(D * R)), h_n({D, B, R});
  Array<T> c_n(call.has_c ? std::vector<int64_t>{D, B, H} : std::vector<int64_t>{0});
  Array<T> saved(train && call.saved_values
                     ? std::vector<int64_t>{D, call.rows, call.saved_values, H}
                     : std::vector<int64_t>{0});
  Array<T> cells(train && call.has_c ? std::vector<int64_t>{D, call.rows, H}
                                     : std::vector<int64_t>{0});
  rnnkern::ForwardParams<T> p{};
  call.fill(p, input, state, weights);
  p.y = call.rows_of(output.mutable_data(), D * R);
  p.h_n = h_n.mutable_data();
  p.c_n = data_or_null(c_n);
  p.saved = data_or_null(saved);
  p.c_states = data_or_null(cells);
  if (B > 0) {
    py::gil_scoped_release release;
    rnnkern::forward(p, kThreads, g_threads);
  }
  return py::make_tuple(output, h_n, c_n, saved, cells);
}

template <class T>
py::tuple backward(std::optional<Array<T>> grad_output, std::optional<Array<T>> grad_h,
                   std::optional<Array<T>> grad_c, Array<T> input,
                   std::optional<std::vector<int64_t>> batch_sizes, std::vector<Array<T>> state,
                   std::vector<Array<T>> weights, Array<T> output, Array<T> saved, Array<T> cells,
                   int cell, bool batch_first) {
  const Call<T> call(input, batch_sizes, state, weights, cell, batch_first);
  const int64_t D = call.directions, B = call.batch, H = call.hidden_size, R = call.width;
  const int64_t rows = call.rows;
  require(output.size() == rows * D * R && saved.size() == D * rows * call.saved_values * H &&
              cells.size() == (call.has_c ? D * rows * H : 0),
          "output, saved and cells must come from forward(..., train=True)");
  require(!grad_output || grad_output->size() == rows * D * R, "grad_output has the wrong shape");
  require((!grad_h || grad_h->size() == D * B * R) && (!grad_c || grad_c->size() == D * B * H),
          "a state's gradient has the wrong shape");
  using Shape = std::vector<int64_t>;
  const Shape none{0};
  Array<T> dx(Shape{rows, call.input_size}), dh_0(Shape{D, B, R}), flow_h(Shape{D, rows, R}),
      dc_0(call.has_c ? Shape{D, B, H} : none), flow_c(call.has_c ? Shape{D, rows, H} : none);
  std::vector<Array<T>> grads;
  for (const auto& w : weights)
    grads.emplace_back(std::vector<int64_t>(w.shape(), w.shape() + w.ndim()));
  rnnkern::BackwardParams<T> p{};
  call.fill(p, input, state, weights);
  p.y = call.rows_of(static_cast<const T*>(output.data()), D * R);
  p.saved = data_or_null(saved);
  p.c_states = data_or_null(cells);
  if (grad_output) p.dy = call.rows_of(static_cast<const T*>(grad_output->data()), D * R);
  p.dh_n = grad_h ? grad_h->data() : nullptr;
  p.dc_n = call.has_c && grad_c ? grad_c->data() : nullptr;
  p.dx = {dx.mutable_data(), B * call.input_size, call.input_size};
  p.dh_0 = dh_0.mutable_data();
  p.dc_0 = data_or_null(dc_0);
  for (int64_t d = 0; d < D; ++d) {
    auto* g = &grads[d * call.per_direction];
    p.grads[d] = {g[0].mutable_data(), g[1].mutable_data(),
                  call.bias ? g[2].mutable_data() : nullptr,
                  call.bias ? g[3].mutable_data() : nullptr,
                  call.proj_size ? g[call.per_direction - 1].mutable_data() : nullptr};
  }
  p.flow_h = flow_h.mutable_data();
  p.flow_c = data_or_null(flow_c);
  if (B > 0) {
    py::gil_scoped_release release;
    rnnkern::backward(p, kThreads, g_threads);
  } else {
    for (auto& g : grads) std::fill_n(g.mutable_data(), g.size(), T(0));
  }
  py::object grad_input = dx;  // rows in time-major order
  if (!call.packed) grad_input = dx.attr("reshape")(call.steps, B, call.input_size);
  if (call.batch_first) grad_input = grad_input.attr("swapaxes")(0, 1);
  return py::make_tuple(grad_input, dh_0, dc_0, grads, flow_h, flow_c);
}

template <class T>
Array<T> math(const std::string& name, Array<T> in) {
  using rnnkern::MathFunction;
  require(name == "exp" || name == "sigmoid" || name == "tanh", "no such function");
  const MathFunction function = name == "exp"       ? MathFunction::exp
                                : name == "sigmoid" ? MathFunction::sigmoid
                                                    : MathFunction::tanh;
  Array<T> out(std::vector<int64_t>(in.shape(), in.shape() + in.ndim()));
  rnnkern::engine().of<T>().math(function, in.data(), out.mutable_data(), in.size());
  return out;
}

template <class T>
void define(py::module_& m) {
  using py::arg;
  m.def("forward", &forward<T>, arg("input").noconvert(), arg("batch_sizes"), arg("state"),
        arg("weights"), arg("cell"), arg("batch_first"), arg("train"));
  m.def("backward", &backward<T>, arg("grad_output"), arg("grad_h"), arg("grad_c"),
        arg("input").noconvert(), arg("batch_sizes"), arg("state"), arg("weights"), arg("output"),
        arg("saved"), arg("cells"), arg("cell"), arg("batch_first"));
  m.def("math", &math<T>, arg("name"), arg("x").noconvert());
}

}  // namespace

PYBIND11_MODULE(_numpy, m) {
  m.doc() = "The CPU engine on NumPy arrays.";
  rnnkern::engine();  // an RNNKERN_CPU that this CPU has not is an error at once
  define<float>(m);
  define<double>(m);
  m.def("isas", [] {
    int count;
    const auto* engines = rnnkern::available_engines(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(engines[i]->name);
    return names;
  });
  m.def("isa", [] { return std::string(rnnkern::engine().name); });
  m.def("set_isa", [](const std::string& name) {
    require(rnnkern::select_engine(name.c_str()), "this CPU has no such level");
  });
  m.def("set_threads", [](int threads) { g_threads = std::max(1, threads); });
}
