// The CPU engine on NumPy arrays: no torch. The arguments mean what those of the torch operators
// mean (torch_ops.cpp); rnnkern/numpy is the public face and has checked the sizes that users get
// wrong.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../core/call_shape.h"
#include "../core/cell_table.h"
#include "../cpu/engine.h"
#include "../cpu/runtime/stream.h"
#include "../cpu/runtime/thread_pool.h"

namespace py = pybind11;

namespace {

using rnnkern::CallSpec;
using rnnkern::PrepackedHeader;
using rnnkern::Shape;
using rnnkern::WeightFormat;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::atomic<int> g_threads = int(std::max(1u, std::thread::hardware_concurrency()));

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// The fields of a CallSpec of Python's (rnnkern/call_spec.py), a tuple.
CallSpec read_spec(const py::tuple& tuple) {
  CallSpec spec;
  require(tuple.size() == std::tuple_size_v<CallSpec::Types>, "expected a CallSpec");
  size_t i = 0;
  spec.each(
      [&](auto& field) { field = py::cast<std::remove_reference_t<decltype(field)>>(tuple[i++]); });
  return spec;
}

template <class T>
Shape shape_of(const Array<T>& a) {
  return {a.shape(), a.ndim()};
}
template <class T>
std::vector<Shape> shapes_of(const std::vector<Array<T>>& arrays) {
  std::vector<Shape> shapes;
  for (const auto& a : arrays) shapes.push_back(shape_of(a));
  return shapes;
}

template <class T>
struct Call : rnnkern::CallShape {
  Call(const Array<T>& input, const std::optional<std::vector<int64_t>>& batch_sizes,
       const std::vector<Array<T>>& state, const std::vector<Shape>& weights, const CallSpec& spec,
       bool masks = false)
      : CallShape(spec, batch_sizes.has_value(), weights.size(), state.size(), fail, masks) {
    read(shape_of(input), shapes_of(state).data(), weights.data(),
         batch_sizes ? batch_sizes->data() : nullptr,
         batch_sizes ? int64_t(batch_sizes->size()) : 0);
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
    p.heads = heads;
    p.x = rows_of(input.data(), input_size);
    for (int64_t d = 0; d < directions && !weights.empty(); ++d) {
      const auto* w = &weights[d * places.count];
      p.weights[d] =
          places.template pointers<rnnkern::Weights<T>>([&](int i) { return w[i].data(); });
    }
    p.h0 = state.empty() ? nullptr : state[0].data();
    p.c0 = state.size() < 2 ? nullptr : state[1].data();
  }
};

// Those of all steps and rows, (kMasks, H); strides are 0.
template <class T>
void fill_masks(rnnkern::LayerParams<T>& p, const Call<T>& call,
                const std::optional<Array<T>>& masks) {
  if (!masks) return;
  call.check_constant_masks(shape_of(*masks));
  p.masks = {masks->data(), 0, 0};
}

template <class T>
T* data_or_null(Array<T>& a) {
  return a.size() ? a.mutable_data() : nullptr;
}

// With prepacked weights, `weights` is empty.
template <class T>
py::tuple run_forward(const Call<T>& call, const Array<T>& input,
                      const std::vector<Array<T>>& state, const std::vector<Array<T>>& weights,
                      bool train, const std::optional<Array<T>>& masks,
                      const PrepackedHeader* prepacked = nullptr) {
  const int64_t D = call.directions, B = call.batch, C = call.c_width, R = call.width;
  Array<T> output(call.row_shape(D * R)), h_n({D, B, R});
  Array<T> c_n(call.has_c ? std::vector<int64_t>{D, B, C} : std::vector<int64_t>{0});
  // Opaque: rnnkern/saved_layout.py reads them.
  Array<T> saved(train ? call.saved_size() : 0), c_states(train ? call.c_states_size() : 0);
  rnnkern::ForwardParams<T> p{};
  call.fill(p, input, state, weights);
  fill_masks(p, call, masks);
  p.prepacked = prepacked;
  p.y = call.rows_of(output.mutable_data(), D * R);
  p.h_n = h_n.mutable_data();
  p.c_n = data_or_null(c_n);
  p.saved = data_or_null(saved);
  p.c_states = data_or_null(c_states);
  if (B > 0) {
    py::gil_scoped_release release;
    rnnkern::forward(p, rnnkern::kOwnThreads, g_threads);
  }
  return py::make_tuple(output, h_n, c_n, saved, c_states);
}

template <class T>
py::tuple forward(Array<T> input, std::optional<std::vector<int64_t>> batch_sizes,
                  std::vector<Array<T>> state, std::vector<Array<T>> weights, py::tuple spec,
                  bool train, std::optional<Array<T>> masks) {
  const Call<T> call(input, batch_sizes, state, shapes_of(weights), read_spec(spec),
                     masks.has_value());
  return run_forward(call, input, state, weights, train, masks);
}

// A layer's weights as the engine multiplies by them; format: a WeightFormat.
template <class T>
Bytes prepack(std::vector<Array<T>> weights, py::tuple spec, int format,
              std::optional<Array<T>> masks) {
  require(!weights.empty(), "expected a layer's weights");
  require(format >= 0 && format <= int(WeightFormat::int8), "no such format of weights");
  require(format == 0 || std::is_same_v<T, float>,
          "only float32 weights can be rounded to bfloat16 or int8");
  const CallSpec read = read_spec(spec);
  const Array<T> row(std::vector<int64_t>{1, 1, input_size_of(read, shapes_of(weights))});
  const Call<T> call(row, {}, {}, shapes_of(weights), read, masks.has_value());
  rnnkern::LayerParams<T> p{};
  call.fill(p, row, {}, weights);
  fill_masks(p, call, masks);
  const size_t bytes = rnnkern::prepacked_bytes(p, WeightFormat(format));
  void* const memory = rnnkern::allocate_block(bytes);
  rnnkern::prepack(p, WeightFormat(format), 0, memory);
  return Bytes(int64_t(bytes), static_cast<uint8_t*>(memory), py::capsule(memory, std::free));
}

const PrepackedHeader& read_prepacked(const Bytes& memory) {
  const char* const refusal = rnnkern::prepacked_refusal(memory.data(), size_t(memory.size()));
  if (refusal) fail(refusal);
  return *reinterpret_cast<const PrepackedHeader*>(memory.data());
}

template <class T>
py::tuple forward_prepacked(Array<T> input, std::optional<std::vector<int64_t>> batch_sizes,
                            std::vector<Array<T>> state, Bytes prepacked, py::tuple fields,
                            int64_t hidden_size, int64_t proj_size) {
  const CallSpec spec = read_spec(fields);
  const PrepackedHeader& header = read_prepacked(prepacked);
  require(rnnkern::is_of(header, spec, hidden_size, proj_size) && header.element_size == sizeof(T),
          "the prepacked weights are another layer's");
  const rnnkern::WeightShapes weights(spec, header);
  const Call<T> call(input, batch_sizes, state, weights.shapes(), spec, rnnkern::has_masks(header));
  const py::tuple all = run_forward<T>(call, input, state, {}, false, {}, &header);
  return py::make_tuple(all[0], all[1], all[2]);
}

// A stream with the arrays that hold its weights.
class Stream {
 public:
  Stream(std::vector<Bytes> layers, int64_t batch, int threads) : layers_(std::move(layers)) {
    std::vector<const PrepackedHeader*> headers;
    for (const Bytes& layer : layers_) headers.push_back(&read_prepacked(layer));
    stream_ = rnnkern::Stream::create(headers, batch, threads);
  }

  py::array run(const py::array& x) {
    switch (sizes().element_size) {
      case 4: return run_typed<float>(x);
      case 8: return run_typed<double>(x);
      default: fail("NumPy has no bfloat16");
    }
  }

  void run_at(uintptr_t x, int64_t steps, uintptr_t y) {
    py::gil_scoped_release release;
    stream_->run(rnnkern::kOwnThreads, reinterpret_cast<const void*>(x), steps,
                 reinterpret_cast<void*>(y));
  }

  void reset(int64_t row) {
    require(row >= 0 && row < sizes().batch, "no such row");
    stream_->reset(row);
  }
  void reset_all() {
    for (int64_t row = 0; row < sizes().batch; ++row) stream_->reset(row);
  }

  const rnnkern::Stream::Sizes& sizes() const { return stream_->sizes(); }
  const char* dtype() const {
    return sizes().element_size == 2   ? "bfloat16"
           : sizes().element_size == 8 ? "float64"
                                       : "float32";
  }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(stream_.get()); }
  uintptr_t h() { return reinterpret_cast<uintptr_t>(stream_->h()); }
  uintptr_t c() { return reinterpret_cast<uintptr_t>(stream_->c()); }

 private:
  template <class T>
  py::array run_typed(const py::array& x) {
    const int64_t rank = x.ndim();
    if (!py::isinstance<py::array_t<T>>(x) || (rank != 2 && rank != 3) ||
        x.shape(rank - 1) != sizes().input_size || x.shape(rank - 2) != sizes().batch ||
        (rank == 3 && !x.shape(0)))
      fail("expected input of " + std::string(dtype()) + " and shape (" +
           std::to_string(sizes().batch) + ", " + std::to_string(sizes().input_size) +
           "), or with a dimension of steps before it");
    const Array<T> rows = Array<T>::ensure(x);
    const int64_t steps = rank == 3 ? x.shape(0) : 1;
    Array<T> y = rank == 3 ? Array<T>({steps, sizes().batch, sizes().width})
                           : Array<T>({sizes().batch, sizes().width});
    const T* const from = rows.data();
    T* const to = y.mutable_data();
    py::gil_scoped_release release;
    stream_->run(rnnkern::kOwnThreads, from, steps, to);
    return y;
  }

  std::vector<Bytes> layers_;
  std::unique_ptr<rnnkern::Stream> stream_;
};

template <class T>
py::tuple backward(std::optional<Array<T>> grad_output, std::optional<Array<T>> grad_h,
                   std::optional<Array<T>> grad_c, Array<T> input,
                   std::optional<std::vector<int64_t>> batch_sizes, std::vector<Array<T>> state,
                   std::vector<Array<T>> weights, Array<T> output, Array<T> saved,
                   Array<T> c_states, py::tuple spec) {
  const Call<T> call(input, batch_sizes, state, shapes_of(weights), read_spec(spec));
  const int64_t D = call.directions, B = call.batch, C = call.c_width, R = call.width;
  const int64_t rows = call.rows;
  call.check_output(shape_of(output), "output");
  call.check_saved(saved.size(), c_states.size());
  if (grad_output) call.check_output(shape_of(*grad_output), "grad_output");
  if (grad_h) call.check(shape_of(*grad_h), "grad_h", {D, B, R});
  if (grad_c && call.has_c) call.check(shape_of(*grad_c), "grad_c", {D, B, C});
  using Sizes = std::vector<int64_t>;
  const Sizes none{0};
  Array<T> dx(Sizes{rows, call.input_size}), dh_0(Sizes{D, B, R}), flow_h(Sizes{D, rows, R}),
      dc_0(call.has_c ? Sizes{D, B, C} : none), flow_c(call.has_c ? Sizes{D, rows, C} : none);
  std::vector<Array<T>> grads;
  for (const auto& w : weights)
    grads.emplace_back(std::vector<int64_t>(w.shape(), w.shape() + w.ndim()));
  rnnkern::BackwardParams<T> p{};
  call.fill(p, input, state, weights);
  p.y = call.rows_of(static_cast<const T*>(output.data()), D * R);
  p.saved = data_or_null(saved);
  p.c_states = data_or_null(c_states);
  if (grad_output) p.dy = call.rows_of(static_cast<const T*>(grad_output->data()), D * R);
  p.dh_n = grad_h ? grad_h->data() : nullptr;
  p.dc_n = call.has_c && grad_c ? grad_c->data() : nullptr;
  p.dx = {dx.mutable_data(), B * call.input_size, call.input_size};
  p.dh_0 = dh_0.mutable_data();
  p.dc_0 = data_or_null(dc_0);
  for (int64_t d = 0; d < D; ++d) {
    auto* g = &grads[d * call.places.count];
    p.grads[d] = call.places.template pointers<rnnkern::WeightGrads<T>>(
        [&](int i) { return g[i].mutable_data(); });
  }
  p.flow_h = flow_h.mutable_data();
  p.flow_c = data_or_null(flow_c);
  if (B > 0) {
    py::gil_scoped_release release;
    rnnkern::backward(p, rnnkern::kOwnThreads, g_threads);
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
  static const std::map<std::string, MathFunction> functions{
      {"exp", MathFunction::exp},           {"sigmoid", MathFunction::sigmoid},
      {"tanh", MathFunction::tanh},         {"log", MathFunction::log},
      {"softplus", MathFunction::softplus}, {"log_sigmoid", MathFunction::log_sigmoid}};
  const auto found = functions.find(name);
  require(found != functions.end(), "no such function");
  Array<T> out(std::vector<int64_t>(in.shape(), in.shape() + in.ndim()));
  rnnkern::engine().of<T>().math(found->second, in.data(), out.mutable_data(), in.size());
  return out;
}

template <class T>
void define(py::module_& m) {
  using py::arg;
  m.def("forward", &forward<T>, arg("input").noconvert(), arg("batch_sizes"), arg("state"),
        arg("weights"), arg("spec"), arg("train"), arg("masks") = py::none());
  m.def("backward", &backward<T>, arg("grad_output"), arg("grad_h"), arg("grad_c"),
        arg("input").noconvert(), arg("batch_sizes"), arg("state"), arg("weights"), arg("output"),
        arg("saved"), arg("c_states"), arg("spec"));
  m.def("prepack", &prepack<T>, arg("weights"), arg("spec"), arg("format"),
        arg("masks") = py::none());
  m.def("forward_prepacked", &forward_prepacked<T>, arg("input").noconvert(), arg("batch_sizes"),
        arg("state"), arg("prepacked"), arg("spec"), arg("hidden_size"), arg("proj_size"));
  m.def("math", &math<T>, arg("name"), arg("x").noconvert());
}

void define_stream(py::module_& m) {
  using py::arg;
  const auto size = [](int64_t rnnkern::Stream::Sizes::* member) {
    return [member](const Stream& s) { return s.sizes().*member; };
  };
  using Sizes = rnnkern::Stream::Sizes;
  py::class_<Stream>(m, "Stream")
      .def(py::init<std::vector<Bytes>, int64_t, int>(), arg("layers"), arg("batch"),
           arg("threads"))
      .def("__call__", &Stream::run, arg("x"))
      .def("run_at", &Stream::run_at, arg("x"), arg("steps"), arg("y"))
      .def("reset", &Stream::reset, arg("row"))
      .def("reset_all", &Stream::reset_all)
      .def_property_readonly("layers", size(&Sizes::layers))
      .def_property_readonly("batch", size(&Sizes::batch))
      .def_property_readonly("input_size", size(&Sizes::input_size))
      .def_property_readonly("hidden_size", size(&Sizes::hidden_size))
      .def_property_readonly("width", size(&Sizes::width))
      .def_property_readonly("c_width", size(&Sizes::c_width))
      .def_property_readonly("dtype", &Stream::dtype)
      .def_property_readonly("address", &Stream::address)
      .def_property_readonly("h_address", &Stream::h)
      .def_property_readonly("c_address", &Stream::c);
}

}  // namespace

// Its only state is the number of threads and, for tests, the level.
PYBIND11_MODULE(_numpy, m, py::mod_gil_not_used()) {
  m.doc() = "The CPU engine on NumPy arrays.";
  rnnkern::engine();  // an RNNKERN_CPU that this CPU has not is an error at once
  define<float>(m);
  define<double>(m);
  define_stream(m);
  m.def("isas", [] {
    int count;
    const auto* engines = rnnkern::available_engines(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(engines[i]->name);
    return names;
  });
  m.def("cells", &rnnkern::cell_table);
  m.def("isa", [] { return std::string(rnnkern::engine().name); });
  m.def("set_isa", [](const std::string& name) {
    require(rnnkern::select_engine(name.c_str()), "this CPU has no such level");
  });
  m.def("set_threads", [](int threads) { g_threads = std::max(1, threads); });
}
