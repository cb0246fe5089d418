// torch's stable C interface, of which a status other than 0 is an error.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct AtenTensorOpaque;
using Tensor = AtenTensorOpaque*;
std::int32_t aoti_torch_get_data_ptr(Tensor tensor, void** address);
std::int32_t aoti_torch_get_size(Tensor tensor, std::int64_t dimension, std::int64_t* size);
std::int32_t aoti_torch_get_stride(Tensor tensor, std::int64_t dimension, std::int64_t* stride);
std::int32_t aoti_torch_empty_strided(std::int64_t dimensions, const std::int64_t* sizes,
                                      const std::int64_t* strides, std::int32_t dtype,
                                      std::int32_t device_type, std::int32_t device_index,
                                      Tensor* made);
std::int32_t aoti_torch__reinterpret_tensor(Tensor tensor, std::int64_t dimensions,
                                            const std::int64_t* sizes, const std::int64_t* strides,
                                            std::int64_t offset, Tensor* made);
std::int32_t aoti_torch_new_tensor_handle(Tensor tensor, Tensor* made);
std::int32_t aoti_torch_delete_tensor_object(Tensor tensor);
std::int32_t aoti_torch_dtype_bfloat16();
std::int32_t aoti_torch_device_type_cpu();
}
