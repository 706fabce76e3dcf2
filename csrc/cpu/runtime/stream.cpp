#include "stream.h"

#include <algorithm>
#include <stdexcept>

#include "../engine.h"

namespace rnnkern {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
class StreamOf : public Stream {
  using S = Acc<T>;

 public:
  StreamOf(const Sizes& sizes, const std::vector<const PrepackedHeader*>& layers, int threads)
      : Stream(sizes),
        engine_(engine_of(CellId(layers[0]->cell))),
        threads_(threads),
        h_(size_t(sizes.layers * sizes.batch * sizes.width)),
        c_(size_t(sizes.layers * sizes.batch * sizes.c_width)) {
    for (size_t k = 0; k < layers.size(); ++k) params_.push_back(params(*layers[k], k));
    between(1);
  }

  void run(const ParallelFor& parallel, const void* x, int64_t steps, void* y) override {
    between(steps);
    const T* in = static_cast<const T*>(x);
    for (size_t k = 0; k < params_.size(); ++k) {
      ForwardParams<T>& p = params_[k];
      T* const out = k + 1 < params_.size() ? between_[k % 2].data() : static_cast<T*>(y);
      p.sequence = {steps, sizes_.batch, nullptr};
      p.x = {in, sizes_.batch * p.input_size, p.input_size};
      p.y = {out, sizes_.batch * sizes_.width, sizes_.width};
      if (steps != planned_steps_) plans_[k] = plan_forward(p, threads_);
      engine_.of<T>().forward(p, plans_[k], parallel, Workspace::of_this_thread());
      in = out;
    }
    planned_steps_ = steps;
  }

  void* h() override { return h_.data(); }
  void* c() override { return c_.empty() ? nullptr : c_.data(); }

  void reset(int64_t row) override {
    for (int64_t k = 0; k < sizes_.layers; ++k) {
      const int64_t at = k * sizes_.batch + row;
      std::fill_n(h_.begin() + at * sizes_.width, sizes_.width, T{});
      std::fill_n(c_.begin() + at * sizes_.c_width, sizes_.c_width, S{});
    }
  }

 private:
  // A layer's states are where it finds them and leaves them: a step reads all of h before it ends,
  // and each c before it writes it.
  ForwardParams<T> params(const PrepackedHeader& layer, size_t k) {
    ForwardParams<T> p{};
    p.cell = CellId(layer.cell);
    p.input_size = layer.input_size, p.hidden_size = layer.hidden_size;
    p.proj_size = layer.proj_size;
    p.directions = 1, p.heads = layer.heads;
    p.prepacked = &layer;
    p.h_n = h_.data() + k * size_t(sizes_.batch * sizes_.width);
    p.h0 = p.h_n;
    if (sizes_.c_width) p.c_n = c_.data() + k * size_t(sizes_.batch * sizes_.c_width);
    p.c0 = p.c_n;
    plans_.emplace_back();
    return p;
  }

  // Room for what one layer hands to the next.
  void between(int64_t steps) {
    const size_t count = sizes_.layers > 1 ? size_t(steps * sizes_.batch * sizes_.width) : 0;
    for (std::vector<T>& y : between_)
      if (y.size() < count) y.resize(count);
  }

  const Engine& engine_;  // whose panels the weights are
  const int threads_;
  std::vector<T> h_, between_[2];
  std::vector<S> c_;
  std::vector<ForwardParams<T>> params_;
  std::vector<Plan> plans_;  // of runs of as many steps as the last one
  int64_t planned_steps_ = 0;
};

}  // namespace

std::unique_ptr<Stream> Stream::create(const std::vector<const PrepackedHeader*>& layers,
                                       int64_t batch, int threads) {
  require(!layers.empty() && batch > 0 && threads > 0,
          "a stream needs a layer, a batch and a thread");
  const PrepackedHeader& first = *layers[0];
  const int64_t width = first.proj_size ? first.proj_size : first.hidden_size;
  const int64_t c_width = (cell_facts(first.cell)->states - 1) * first.hidden_size;
  for (const PrepackedHeader* const layer : layers) {
    require(layer->directions == 1, "a stream runs in one direction");
    require(layer->cell == first.cell && layer->element_size == first.element_size &&
                layer->hidden_size == first.hidden_size && layer->proj_size == first.proj_size &&
                layer->heads == first.heads &&
                layer->input_size == (layer == &first ? first.input_size : width),
            "the layers of a stream are not those of one stack");
  }
  const Sizes sizes{int64_t(layers.size()), batch,  first.input_size, first.hidden_size, width,
                    first.element_size,     c_width};
  switch (sizes.element_size) {
    case 2: return std::make_unique<StreamOf<bfloat16>>(sizes, layers, threads);
    case 8: return std::make_unique<StreamOf<double>>(sizes, layers, threads);
    default: return std::make_unique<StreamOf<float>>(sizes, layers, threads);
  }
}

}  // namespace rnnkern
