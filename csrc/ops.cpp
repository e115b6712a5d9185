// Op schemas and the Python module; implementations register themselves from their own files.
#include <torch/library.h>

#include <pybind11/pybind11.h>

TORCH_LIBRARY_FRAGMENT(bacon_fast, m) {
  // Memory bank (csrc/bank).
  m.def(
      "bank_select_(Tensor(a!) selected_label, Tensor(b!) class_counts, Tensor(c!) class_sums, Tensor(d!) class_sizes, "
      "Tensor bank, Tensor written, Tensor slots, Tensor labels, Tensor gate) -> ()");
  m.def(
      "bank_write_(Tensor(a!) bank, Tensor(b!) written, Tensor(c!) class_sums, Tensor(d!) class_sizes, "
      "Tensor(e!) centers, Tensor(f!) has_center, Tensor selected_label, Tensor slots, Tensor features, Tensor gate) "
      "-> ()");

  // FixMatch's and ABC's losses of both heads with their gradients (csrc/heads/cpu.cpp).
  m.def(
      "fixmatch_abc_cpu(Tensor logits, Tensor balanced, Tensor labels, Tensor true_labels, Tensor keep_labeled, "
      "Tensor keep_unlabeled, Tensor step, int seed, bool expected, float threshold, int num_views, bool soft_targets) "
      "-> (Tensor losses, Tensor stats, Tensor counts, Tensor grad_logits, Tensor grad_balanced)");
  m.def(
      "fixmatch_abc_backward_cpu(Tensor grad_losses, Tensor grad_logits, Tensor grad_balanced, Tensor logits, "
      "Tensor balanced, int batch, int num_unlabeled) -> (Tensor, Tensor)");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "bacon_fast's native operators; importing this module registers them with torch.ops.bacon_fast";
#ifdef BACON_FAST_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
