// What a call reads while it writes its buffers must not lie in them: rows would be read after they were replaced.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace bacon_fast {

using Tensors = std::initializer_list<const at::Tensor*>;

// The tensor, contiguous; a copy where it shares memory with one of the tensors that are changed.
inline at::Tensor apart(const at::Tensor& tensor, Tensors changed) {
  for (const at::Tensor* other : changed) {
    if (tensor.is_alias_of(*other)) return tensor.clone(at::MemoryFormat::Contiguous);
  }
  return tensor.contiguous();
}

}  // namespace bacon_fast
