// The Python module. Each operation's files register its code with torch.ops.bacon_fast; the schema, written once, is in
// bacon_fast/ops/ beside the operation's fake and derivative.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "bacon_fast's native operators; importing this module registers them with torch.ops.bacon_fast";
#ifdef BACON_FAST_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
#ifdef _OPENMP
  m.attr("built_with_openmp") = true;
#else
  m.attr("built_with_openmp") = false;
#endif
}
