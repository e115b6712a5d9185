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

  // The contrastive family (csrc/contrastive/cpu.cpp); arguments and formulas: bacon_fast/reference/contrastive.py.
  m.def(
      "contrastive_forward_cpu("
      "Tensor rows, Tensor columns, Tensor? own, Tensor row_code, Tensor column_code, Tensor self_column, "
      "Tensor positive_scale, Tensor? own_scale, Tensor negative_scale, Tensor negative_bias, Tensor negative_offset, "
      "Tensor? group, int num_groups, *, str form, str match, float floor, float eps, bool columns_normalized) -> "
      "(Tensor row_loss, Tensor stats)");
  m.def(
      "contrastive_backward_cpu(Tensor grad_row_loss, Tensor stats, "
      "Tensor rows, Tensor columns, Tensor? own, Tensor row_code, Tensor column_code, Tensor self_column, "
      "Tensor positive_scale, Tensor? own_scale, Tensor negative_scale, Tensor negative_bias, Tensor negative_offset, "
      "Tensor? group, int num_groups, *, str form, str match, float floor, float eps, bool columns_normalized, "
      "bool needs_rows, bool needs_columns, bool needs_own) -> (Tensor grad_rows, Tensor grad_columns, Tensor grad_own)");

  // BaCon's loss and gradient in one pass (csrc/contrastive/bacon_cpu.cpp).
  m.def(
      "bacon_step_cpu(Tensor features, Tensor labels, Tensor logits, Tensor centers, Tensor? has_center, "
      "Tensor selected, Tensor class_counts, Tensor progress, float temperature, float bta, float? negative_weight, "
      "int top_k, str neg_mode, float min_temperature) -> (Tensor loss, Tensor grad_features)");
  m.def("bacon_step_backward_cpu(Tensor grad_loss, Tensor grad_features, Tensor features) -> Tensor");

  // FixMatch's and ABC's losses of both heads with their gradients (csrc/heads/cpu.cpp).
  m.def(
      "fixmatch_abc_cpu(Tensor logits, Tensor balanced, Tensor labels, Tensor true_labels, Tensor keep_labeled, "
      "Tensor keep_unlabeled, Tensor step, int seed, bool expected, float threshold, int num_views, bool soft_targets) "
      "-> (Tensor losses, Tensor stats, Tensor counts, Tensor grad_logits, Tensor grad_balanced)");
  m.def(
      "fixmatch_abc_backward_cpu(Tensor grad_losses, Tensor grad_logits, Tensor grad_balanced, Tensor logits, "
      "Tensor balanced, int batch, int num_unlabeled) -> (Tensor, Tensor)");

  // Augmentation (csrc/augment): one request is an index tensor with its stream, 0 for weak or 1 for strong, first slot.
  m.def(
      "augment_views(Tensor pool, Tensor[] indices, int[] streams, int[] strong, int[] first_slots, int seed, "
      "Tensor step, Tensor table, Tensor ranges, int padding, bool hflip, int num_ops, bool cutout, ScalarType dtype, "
      "bool channels_last) -> Tensor");
  m.def("augment_ops(Tensor images, Tensor ops, Tensor magnitudes) -> Tensor");

  // BatchNorm with residual sum and LeakyReLU (csrc/norm); arguments and formulas: bacon_fast/batch_norm_ops.py.
  m.def(
      "batch_norm_act_cpp(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float momentum, float eps, float negative_slope) "
      "-> (Tensor activated, Tensor sum, Tensor mean, Tensor inverse)");
  m.def(
      "batch_norm_act_backward_cpp(Tensor grad_activated, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor inverse, float negative_slope) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  // Nesterov SGD and the moving average (csrc/optim); an empty gradient or average stands for none.
  m.def(
      "sgd_ema_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] momenta, Tensor(c!)[] averages, "
      "float[] weight_decays, Tensor(d!)[] copies, Tensor[] copied, Tensor rate, float momentum, "
      "float average_momentum, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

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
