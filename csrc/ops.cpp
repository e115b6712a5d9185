// Op schemas and the Python module; implementations register themselves from their own files.
#include <torch/library.h>

#include <pybind11/pybind11.h>

TORCH_LIBRARY_FRAGMENT(bacon_fast, m) {
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "bacon_fast's native operators; importing this module registers them with torch.ops.bacon_fast";
#ifdef BACON_FAST_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
