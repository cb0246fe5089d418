// A forward pass of few rows up to a model's head: embeddings, layers and the last norm.
//
// A layer is the functions that ahead.py compiled, called by torch's stable C interface, with
// attention over pages in their midst. Of the rows the first ones attend, and the first ones go
// through the MLP; the others pass through, or gain what stands in dropped attention's place:
//
//   hidden   [ a0 a1 b0 | c0 c1 ]     3 of 5 rows attend
//
// What a function is given it lets go of, so it gets a reference of its own to each tensor.

#pragma once

#ifdef __AVX512VNNI__

#include "chunks.h"
#include "maps.h"
#include "norms.h"
#include "rows.h"
#include "tensors.h"

namespace {

struct Failed {};

void check(std::int32_t status) {
  if (status) throw Failed{};
}

// A compiled function, as torch's ahead-of-time compiler makes it.
struct Function {
  void* container;
  std::int32_t (*run)(void* container, Tensor* inputs, std::size_t input_count, Tensor* outputs,
                      std::size_t output_count, void* stream, void* proxy);
};

struct Layer {
  Function before, after, mlp;  // query, key, value; output projection and sum; the MLP sublayer
  const Tensor* weights;
  Index weight_count;
  const Pages* pages;  // attends nowhere: null
  Index group, window;
  float scaling, softcap;        // no softcap: 0
  const Substitute* substitute;  // nothing stands in its attention's place: null
};

// Rows [count, width] of numbers.
struct Table {
  const Bfloat16* numbers;
  Index count, width;
};

struct Model {
  const Layer* layers;
  Index layer_count;
  Table embedding, cosines, sines;  // of tokens, and of positions
  const float* gain;                // of the last norm
  float epsilon;
};

// The rows that attend in the layers of a group, as attend_chunks takes them.
struct Tables {
  Index sequences;
  const Index* slots;
  const std::int32_t* table;
  const Index *table_starts, *lengths, *starts;
};

struct Step {
  Index rows;
  const Index *tokens, *positions;   // [rows]
  const Index *attending, *through;  // [layers] rows that attend; that go through the MLP
  const Tables* tables;              // of each group
  const Index* wanted;  // rows that are normed
  Index wanted_count;
};

// A reference to a tensor in bfloat16.
class Held {
 public:
  Held() = default;
  explicit Held(Tensor tensor) : tensor_(tensor) {}
  Held(Held&& other) : tensor_(std::exchange(other.tensor_, nullptr)) {}
  Held& operator=(Held&& other) {
    std::swap(tensor_, other.tensor_);
    return *this;
  }
  ~Held() {
    if (tensor_) aoti_torch_delete_tensor_object(tensor_);
  }

  Tensor get() const { return tensor_; }
  Tensor* place() { return &tensor_; }

  Tensor another() const {
    Tensor made;
    check(aoti_torch_new_tensor_handle(tensor_, &made));
    return made;
  }

  Bfloat16* numbers() const {
    void* address;
    check(aoti_torch_get_data_ptr(tensor_, &address));
    return static_cast<Bfloat16*>(address);
  }

  Index size(Index dimension) const {
    Index size;
    check(aoti_torch_get_size(tensor_, dimension, &size));
    return size;
  }

  Index stride(Index dimension) const {
    Index stride;
    check(aoti_torch_get_stride(tensor_, dimension, &stride));
    return stride;
  }

  // The first rows.
  Held first(Index rows) const {
    const Index width = size(2);
    const Index sizes[] = {1, rows, width}, strides[] = {rows * width, width, 1};
    Held made;
    check(aoti_torch__reinterpret_tensor(tensor_, 3, sizes, strides, 0, made.place()));
    return made;
  }

 private:
  Tensor tensor_ = nullptr;
};

template <std::size_t kDimensions>
Held made(const Index (&sizes)[kDimensions]) {
  Index strides[kDimensions], stride = 1;
  for (std::size_t i = kDimensions; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  Held tensor;
  check(aoti_torch_empty_strided(kDimensions, sizes, strides, aoti_torch_dtype_bfloat16(),
                                 aoti_torch_device_type_cpu(), 0, tensor.place()));
  return tensor;
}

void copy(const Bfloat16* from, Bfloat16* to, Index count) {
  std::memcpy(to, from, count * sizeof(Bfloat16));
}

Held rows_of(const Table& table, const Index* places, Index rows) {
  const Index width = table.width;
  Held tensor = made({1, rows, width});
  Bfloat16* to = tensor.numbers();
  for (Index row = 0; row < rows; ++row) {
    check(places[row] < 0 || places[row] >= table.count);
    copy(table.numbers + places[row] * width, to + row * width, width);
  }
  return tensor;
}

// The rows of [1, heads, rows, dim].
Rows laid_out(const Held& heads) { return {heads.numbers(), heads.stride(2), heads.stride(1)}; }

// Write what a function makes of some tensors and its layer's weights.
template <std::size_t kInputs, std::size_t kOutputs>
void call(const Function& function, const Layer& layer, const Held* const (&inputs)[kInputs],
          Held (&outputs)[kOutputs]) {
  static thread_local std::vector<Tensor> given;
  given.clear();
  for (const Held* input : inputs) given.push_back(input->another());
  for (Index i = 0; i < layer.weight_count; ++i) {
    given.push_back(nullptr);
    check(aoti_torch_new_tensor_handle(layer.weights[i], &given.back()));
  }
  Tensor results[kOutputs];
  check(function.run(function.container, given.data(), given.size(), results, kOutputs, nullptr,
                     nullptr));
  for (std::size_t i = 0; i < kOutputs; ++i) outputs[i] = Held(results[i]);
}

class Pass {
 public:
  Pass(const Model& model, const Step& step)
      : model_(model), step_(step),
        hidden_(rows_of(model.embedding, step.tokens, step.rows)),
        cosines_(rows_of(model.cosines, step.positions, step.rows)),
        sines_(rows_of(model.sines, step.positions, step.rows)) {}

  void run(Bfloat16* out) {
    for (Index i = 0; i < model_.layer_count; ++i) {
      const Layer& layer = model_.layers[i];
      replace(step_.attending[i], layer.substitute, [&](const Held& hidden, Index rows) {
        return attention(layer, hidden, rows);
      });
      replace(step_.through[i], nullptr,
              [&](const Held& hidden, Index) { return mlp(layer, hidden); });
    }
    const Index width = model_.embedding.width;
    const Bfloat16* hidden = hidden_.numbers();
    for (Index i = 0; i < step_.wanted_count; ++i)
      norm_rows(hidden + step_.wanted[i] * width, model_.gain, out + i * width, 1, width,
                model_.epsilon);
  }

 private:
  // Let a sublayer compute the first rows, and a substitute the others if there is one.
  template <class Sublayer>
  void replace(Index count, const Substitute* substitute, Sublayer sublayer) {
    const Index rows = step_.rows, width = model_.embedding.width;
    if (count == rows) {
      hidden_ = sublayer(hidden_, rows);
      return;
    }
    if (count == 0 && !substitute) return;
    Held all = made({1, rows, width});
    const Bfloat16* from = hidden_.numbers() + count * width;
    Bfloat16* to = all.numbers();
    if (substitute)
      substitute_rows(from, to + count * width, rows - count, substitute);
    else
      copy(from, to + count * width, (rows - count) * width);
    if (count) copy(sublayer(hidden_.first(count), count).numbers(), to, count * width);
    hidden_ = std::move(all);
  }

  Held attention(const Layer& layer, const Held& hidden, Index rows) {
    const bool all = rows == step_.rows;
    const Held some_cosines = all ? Held() : cosines_.first(rows);
    const Held some_sines = all ? Held() : sines_.first(rows);
    const Held &cosines = all ? cosines_ : some_cosines, &sines = all ? sines_ : some_sines;
    Held parts[3], result[1];
    call(layer.before, layer, {&hidden, &cosines, &sines}, parts);
    const Held attended = attend(layer, parts[0], parts[1], parts[2], rows);
    call(layer.after, layer, {&hidden, &cosines, &sines, &attended}, result);
    return std::move(result[0]);
  }

  Held mlp(const Layer& layer, const Held& hidden) {
    Held result[1];
    call(layer.mlp, layer, {&hidden}, result);
    return std::move(result[0]);
  }

  Held attend(const Layer& layer, const Held& query, const Held& key, const Held& value,
              Index rows) {
    const Pages& pages = *layer.pages;
    const Tables& tables = step_.tables[layer.group];
    const Index heads = query.size(1);
    Held out = made({1, rows, heads, pages.dim});
    const Rows q = laid_out(query), k = laid_out(key), v = laid_out(value);
    if (pages.dim % kTokens == 0 && layer.softcap == 0)
      attend_chunks(q.numbers, q.row_stride, q.head_stride, k.numbers, k.row_stride, k.head_stride,
                    v.numbers, v.row_stride, v.head_stride, out.numbers(), heads, layer.scaling,
                    layer.window, &pages, tables.sequences, tables.slots, tables.table,
                    tables.table_starts, tables.lengths, tables.starts);
    else
      attend_rows(q.numbers, q.row_stride, q.head_stride, k.numbers, k.row_stride, k.head_stride,
                  v.numbers, v.row_stride, v.head_stride, out.numbers(), heads, layer.scaling,
                  layer.softcap, layer.window, &pages, tables.sequences, tables.slots, tables.table,
                  tables.table_starts, tables.lengths);
    return out;
  }

  const Model& model_;
  const Step& step_;
  Held hidden_, cosines_, sines_;
};

}  // namespace

// Write the normed rows [wanted_count, width] that a step wants; return 0, or 1 if it failed.
extern "C" std::int32_t forward_rows(const Model* model, const Step* step, Bfloat16* out) {
  try {
    Pass(*model, *step).run(out);
    return 0;
  } catch (const Failed&) {
    return 1;
  }
}

#endif
