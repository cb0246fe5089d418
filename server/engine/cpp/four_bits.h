// Products of layers whose weights are in four bits, for processors that multiply integers of 8 and
// of 16 bits (AVX512_VNNI, which all have that have AVX512_BF16). Called by the compiled functions
// of ahead.py through torch's stable C interface, and by native.py.

#pragma once

#ifdef __AVX512VNNI__

#include "few_rows.h"
#include "many_rows.h"
#include "tensors.h"

// The rows up to which it is faster than torch's functions, which multiply tiles by AMX.
#ifdef AMX
extern "C" const Index four_bit_rows = 32;
#else
extern "C" const Index four_bit_rows = kAnyRows;
#endif

// out [rows, outputs] = inputs [rows, width] * weights, as torch packs them for its own kernel:
// packed and scales [width / kGroup, outputs, 2], all contiguous. Outputs come in multiples of
// kColumns, since torch packs what is left over in another order.
extern "C" void four_bit_product(const Bfloat16* inputs, const std::uint8_t* packed,
                                 const Bfloat16* scales, Bfloat16* out, Index rows, Index outputs,
                                 Index width) {
  const auto product = rows > kExactRows ? many_rows_product : few_rows_product;
  product(inputs, packed, scales, out, rows, outputs, width);
}

// As four_bit_product, by torch's stable C interface.
extern "C" std::int32_t aoti_torch_cpu_four_bit_rows(Tensor inputs, Tensor packed, Tensor scales,
                                                     Tensor* out) {
  Index rows, width, outputs, stride;
  void *from, *weights, *steps, *to;
  if (aoti_torch_get_size(inputs, 0, &rows) || aoti_torch_get_size(inputs, 1, &width) ||
      aoti_torch_get_size(scales, 1, &outputs) || aoti_torch_get_stride(inputs, 0, &stride) ||
      outputs % kColumns || (rows > 1 && stride != width))
    return 1;
  const Index sizes[] = {rows, outputs}, strides[] = {outputs, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_bfloat16(),
                               aoti_torch_device_type_cpu(), 0, out) ||
      aoti_torch_get_data_ptr(inputs, &from) || aoti_torch_get_data_ptr(packed, &weights) ||
      aoti_torch_get_data_ptr(scales, &steps) || aoti_torch_get_data_ptr(*out, &to))
    return 1;
  four_bit_product(static_cast<Bfloat16*>(from), static_cast<std::uint8_t*>(weights),
                   static_cast<Bfloat16*>(steps), static_cast<Bfloat16*>(to), rows, outputs, width);
  return 0;
}

#endif
