// The only file that includes pybind11: params structs as keyword constructors, kernels as functions on them.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>

#include "buffers.h"
#include "kernels.h"
#include "types.h"
#ifdef TK_WITH_CUDA
#include "cuda_kernels.h"
#endif

namespace py = pybind11;

namespace {

// Writes one Python value into a field: pointers come as integers (0 or None: null), enums as integers,
// fixed arrays as sequences.
template <class T>
void store(T& field, py::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    field = value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<std::uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(value.cast<std::underlying_type_t<T>>());
  } else if constexpr (std::is_array_v<T>) {
    py::sequence values = py::reinterpret_borrow<py::sequence>(value);
    if (py::len(values) != std::extent_v<T>) throw py::value_error("an array field got the wrong number of values");
    for (std::size_t i = 0; i < std::extent_v<T>; ++i) store(field[i], values[i]);
  } else {
    field = value.cast<T>();
  }
}

template <class P>
using Setters = std::map<std::string, void (*)(P&, py::handle), std::less<>>;

// Module.NAME(field=value, ...): a params struct; fields left out are zero or their default.
template <class P>
void bind_params(py::module_& module, const char* name, const Setters<P>& setters) {
  using Setter = void (*)(P&, py::handle);
  // A call's keywords are the same str objects each time: known ones, kept alive, spare 40 searches by name a call.
  auto* known = new std::unordered_map<PyObject*, Setter>;
  py::class_<P>(module, name).def(py::init([setters, name, known](const py::kwargs& fields) {
    P params{};
    for (std::pair<py::handle, py::handle> field : fields) {
      const auto seen = known->find(field.first.ptr());
      if (seen != known->end()) {
        seen->second(params, field.second);
        continue;
      }
      const char* key = PyUnicode_AsUTF8(field.first.ptr());  // keyword names are str
      const auto found = setters.find(std::string_view(key));
      if (found == setters.end()) throw py::type_error(std::string(name) + " has no field '" + key + "'");
      if (PyUnicode_CHECK_INTERNED(field.first.ptr())) known->emplace(field.first.inc_ref().ptr(), found->second);
      found->second(params, field.second);
    }
    return params;
  }));
}

// TK_FIELDS(Params, a, b, …): the setters of the named fields.
#define TK_FIELD(P, field) {#field, [](P& params, py::handle value) { store(params.field, value); }}
#define TK_PARENS ()
#define TK_EXPAND(...) TK_EXPAND3(TK_EXPAND3(TK_EXPAND3(TK_EXPAND3(__VA_ARGS__))))
#define TK_EXPAND3(...) TK_EXPAND2(TK_EXPAND2(TK_EXPAND2(TK_EXPAND2(__VA_ARGS__))))
#define TK_EXPAND2(...) TK_EXPAND1(TK_EXPAND1(TK_EXPAND1(TK_EXPAND1(__VA_ARGS__))))
#define TK_EXPAND1(...) __VA_ARGS__
#define TK_EACH(P, field, ...) TK_FIELD(P, field) __VA_OPT__(, TK_EACH_AGAIN TK_PARENS(P, __VA_ARGS__))
#define TK_EACH_AGAIN() TK_EACH
#define TK_FIELDS(P, ...) Setters<P>{TK_EXPAND(TK_EACH(P, __VA_ARGS__))}

// module.NAME(params) runs kernels().NAME with the GIL released.
#define TK_BIND_KERNEL(module, name, P) \
  module.def(#name, [](const P& params) { tk::kernels().name(params); }, py::call_guard<py::gil_scoped_release>())

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "thinkernel's C++ and CUDA kernels; called by thinkernel.ops alone.";
  m.def("isa", [] { return tk::kernels().level; }, "The ISA level in use.");
  m.def("isa_levels", [] {
    py::list names;
    for (const char* const* name = tk::isa_levels(); *name != nullptr; ++name) names.append(*name);
    return names;
  }, "The ISA levels this CPU runs and this build has, lowest first.");
  m.def("set_isa", [](const std::string& level) { tk::set_isa(level.c_str()); }, "Chooses a level; for tests.");

  py::class_<tk::Buffer>(m, "Buffer", "Memory for a result, kept when freed.", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer([](const tk::Buffer& b) {
        return py::buffer_info(static_cast<std::uint8_t*>(b.data()), static_cast<py::ssize_t>(b.bytes()));
      });
  m.def("kept_bytes", &tk::kept_bytes, "Bytes of freed results kept for results to come.");

  // AttentionShape's fields, which all three take
#define TK_ATTENTION_SHAPE dtype, batch, q_len, k_len, heads, kv_heads, head_dim, value_dim, scale, causal, window_left, \
      window_right, chunk, softcap, threads
  using tk::AttentionForwardParams, tk::AttentionBackwardParams, tk::AttentionDecodeParams;
  bind_params<AttentionForwardParams>(m, "AttentionForwardParams", TK_FIELDS(AttentionForwardParams, TK_ATTENTION_SHAPE, q,
      k, v, sinks, key_start, cu_seqlens_q, cu_seqlens_k, out, lse, q_stride, k_stride, v_stride, out_stride));
  bind_params<AttentionBackwardParams>(m, "AttentionBackwardParams", TK_FIELDS(AttentionBackwardParams, TK_ATTENTION_SHAPE,
      q, k, v, out, lse, dout, dlse, sinks, key_start, cu_seqlens_q, cu_seqlens_k, dq, dk, dv, dsinks, q_stride, k_stride, v_stride, out_stride,
      dout_stride, dq_stride, dk_stride, dv_stride));
  bind_params<AttentionDecodeParams>(m, "AttentionDecodeParams", TK_FIELDS(AttentionDecodeParams, TK_ATTENTION_SHAPE, q, k,
      v, seqlens, block_table, sinks, out, lse, page_size, max_pages, prefix_k, prefix_v, prefix_table,
      prefix_length, prefix_page_size, prefix_k_stride, prefix_v_stride, q_stride, out_stride, k_stride, v_stride));
  TK_BIND_KERNEL(m, attention_forward, AttentionForwardParams);
  TK_BIND_KERNEL(m, attention_backward, AttentionBackwardParams);
  TK_BIND_KERNEL(m, attention_decode, AttentionDecodeParams);

#define TK_LATENT_CACHE dtype, quantised, batch, seqlens, block_table, page_size, max_pages, kv_stride, threads, kv
  using tk::MlaDecodeParams, tk::LatentAppendParams, tk::LatentGatherParams;
  bind_params<MlaDecodeParams>(m, "MlaDecodeParams", TK_FIELDS(MlaDecodeParams, TK_LATENT_CACHE, q, out, lse, q_len, heads,
      head_dim, value_dim, scale, prefix, prefix_table, prefix_length, prefix_page_size, prefix_stride));
  bind_params<LatentAppendParams>(m, "LatentAppendParams", TK_FIELDS(LatentAppendParams, TK_LATENT_CACHE, latent, rope, source,
      q_len, latent_dim, rope_dim, latent_stride, rope_stride));
  bind_params<LatentGatherParams>(m, "LatentGatherParams", TK_FIELDS(LatentGatherParams, TK_LATENT_CACHE, out, length, head_dim));
  TK_BIND_KERNEL(m, mla_decode, MlaDecodeParams);
  TK_BIND_KERNEL(m, append_latent, LatentAppendParams);
  TK_BIND_KERNEL(m, gather_latent, LatentGatherParams);

  using tk::LinearForwardParams, tk::LinearBackwardParams, tk::LinearLogprobForwardParams, tk::LinearLogprobBackwardParams;
  bind_params<LinearForwardParams>(m, "LinearForwardParams", TK_FIELDS(LinearForwardParams, dtype, n, in, out, x, x_stride,
      weight, weight_stride, bias, y, y_stride, threads));
  bind_params<LinearBackwardParams>(m, "LinearBackwardParams", TK_FIELDS(LinearBackwardParams, dtype, n, in, out, dy,
      dy_stride, x, x_stride, weight, weight_stride, dx, dweight, dbias, threads));
  bind_params<LinearLogprobForwardParams>(m, "LinearLogprobForwardParams", TK_FIELDS(LinearLogprobForwardParams, dtype, n,
      d, v, hidden, hidden_stride, weight, weight_stride, bias, target, ignore_index, temperature, softcap, logprob, entropy,
      lse, kept, kept_blocks, threads));
  bind_params<LinearLogprobBackwardParams>(m, "LinearLogprobBackwardParams", TK_FIELDS(LinearLogprobBackwardParams, dtype,
      n, d, v, hidden, hidden_stride, weight, weight_stride, bias, target, ignore_index, temperature, softcap, dlogprob,
      dentropy, lse, entropy, kept, kept_blocks, dhidden, dhidden_float, dweight, dweight_add, dbias, threads));
  bind_params<tk::LogprobForwardParams>(m, "LogprobForwardParams", TK_FIELDS(tk::LogprobForwardParams, dtype, b, s, v, logits,
      stride, target, ignore_index, temperature, softcap, logprob, entropy, lse, threads));
  bind_params<tk::LogprobBackwardParams>(m, "LogprobBackwardParams", TK_FIELDS(tk::LogprobBackwardParams, dtype, b, s, v,
      logits, stride, target, ignore_index, temperature, softcap, dlogprob, dentropy, lse, entropy, dlogits, threads));
  TK_BIND_KERNEL(m, linear_forward, LinearForwardParams);
  TK_BIND_KERNEL(m, linear_backward, LinearBackwardParams);
  TK_BIND_KERNEL(m, linear_logprob_forward, LinearLogprobForwardParams);
  TK_BIND_KERNEL(m, linear_logprob_backward, LinearLogprobBackwardParams);
  TK_BIND_KERNEL(m, logprob_forward, tk::LogprobForwardParams);
  TK_BIND_KERNEL(m, logprob_backward, tk::LogprobBackwardParams);

  using tk::PolicyLossParams, tk::GroupAdvantagesParams;
#define TK_POLICY_LOSS form, level, reduction, kl, rollout, \
      kl_correction, off_policy, ratio_low, ratio_high, delta, log_ratio_clamp, beta, rollout_low, rollout_high, \
      off_policy_threshold, tau_positive, tau_negative, sequences, length, cu_seqlens, logprob, old_logprob, ref_logprob, \
      rollout_logprob, entropy, advantages, mask, logprob_stride, old_logprob_stride, ref_logprob_stride, \
      rollout_logprob_stride, entropy_stride, advantages_stride, mask_stride, advantage_per_token, mask_bytes, mask_is_float, \
      total, top_entropy, entropy_coef, loss, metrics, dlogprob, dref_logprob, dentropy, threads
#define TK_ADVANTAGES samples, rewards_each, rewards, group_size, group_ids, weights, token_counts, normalize, \
      normalize_then_sum, eps, correction, advantages, zero_variance
  bind_params<PolicyLossParams>(m, "PolicyLossParams", TK_FIELDS(PolicyLossParams, TK_POLICY_LOSS));
  bind_params<GroupAdvantagesParams>(m, "GroupAdvantagesParams", TK_FIELDS(GroupAdvantagesParams, TK_ADVANTAGES));
  TK_BIND_KERNEL(m, policy_loss, PolicyLossParams);
  TK_BIND_KERNEL(m, group_advantages, GroupAdvantagesParams);

  bind_params<tk::TopkParams>(m, "TopkParams", TK_FIELDS(tk::TopkParams, scores, lengths, values, indices, workspace,
      workspace_bytes, dtype, rows, length, row_stride, k, chunk, threads));
  TK_BIND_KERNEL(m, topk, tk::TopkParams);

  using tk::IndexerTopkParams;
  bind_params<IndexerTopkParams>(m, "IndexerTopkParams", TK_FIELDS(IndexerTopkParams, dtype, quantised, causal, batch, q_len, k_len,
      heads, head_dim, top_k, threads, q, k, w, k_scale, k_stride, k_scale_stride, cu_seqlens_q, cu_seqlens_k, seqlens, block_table,
      page_size, max_pages, indices));
  TK_BIND_KERNEL(m, indexer_topk, IndexerTopkParams);
#define TK_INDEXER dtype, causal, batch, q_len, k_len, heads, head_dim, threads, q, k, w, k_stride
#define TK_INDEXER_TARGET target_heads, target_kv_heads, target_dim, slots, scale, target_q, target_k, target_stride, indices, kept
  using tk::IndexerScoresParams, tk::IndexerScoresBackwardParams, tk::IndexerLossParams, tk::IndexerLossBackwardParams;
  bind_params<IndexerScoresParams>(m, "IndexerScoresParams", TK_FIELDS(IndexerScoresParams, TK_INDEXER, scores));
  bind_params<IndexerScoresBackwardParams>(m, "IndexerScoresBackwardParams", TK_FIELDS(IndexerScoresBackwardParams, TK_INDEXER,
      dscores, dq, dk, dw));
  bind_params<IndexerLossParams>(m, "IndexerLossParams", TK_FIELDS(IndexerLossParams, TK_INDEXER, TK_INDEXER_TARGET, target_lse,
      loss, total));
  bind_params<IndexerLossBackwardParams>(m, "IndexerLossBackwardParams", TK_FIELDS(IndexerLossBackwardParams, TK_INDEXER,
      TK_INDEXER_TARGET, dloss, dq, dk, dw));
  TK_BIND_KERNEL(m, indexer_scores, IndexerScoresParams);
  TK_BIND_KERNEL(m, indexer_scores_backward, IndexerScoresBackwardParams);
  TK_BIND_KERNEL(m, indexer_loss, IndexerLossParams);
  TK_BIND_KERNEL(m, indexer_loss_backward, IndexerLossBackwardParams);
#define TK_SPARSE dtype, quantised, batch, q_len, k_len, heads, kv_heads, head_dim, value_dim, slots, scale, threads, q, k, v, \
      k_stride, v_stride, indices, sinks, cu_seqlens_q, cu_seqlens_k, seqlens, block_table, page_size, max_pages
  using tk::SparseForwardParams, tk::SparseBackwardParams;
  bind_params<SparseForwardParams>(m, "SparseForwardParams", TK_FIELDS(SparseForwardParams, TK_SPARSE, out, lse));
  bind_params<SparseBackwardParams>(m, "SparseBackwardParams", TK_FIELDS(SparseBackwardParams, TK_SPARSE, out, lse, dout, dlse,
      dq, dk, dv, dsinks));
  TK_BIND_KERNEL(m, sparse_forward, SparseForwardParams);
  TK_BIND_KERNEL(m, sparse_backward, SparseBackwardParams);

#define TK_BLOCK_SPARSE TK_ATTENTION_SHAPE, choosing, slots, block, q, k, v, q_stride, k_stride, v_stride, indices, cu_seqlens
  using tk::BlockSparseForwardParams, tk::BlockSparseBackwardParams, tk::BlockSelectParams;
  bind_params<BlockSparseForwardParams>(m, "BlockSparseForwardParams", TK_FIELDS(BlockSparseForwardParams, TK_BLOCK_SPARSE, out, lse));
  bind_params<BlockSelectParams>(m, "BlockSelectParams", TK_FIELDS(BlockSelectParams, TK_ATTENTION_SHAPE, slots, block, compress_block,
      stride, q, k, lse, q_stride, k_stride, cu_seqlens, cu_compressed, seqlens, indices));
  bind_params<BlockSparseBackwardParams>(m, "BlockSparseBackwardParams", TK_FIELDS(BlockSparseBackwardParams, TK_BLOCK_SPARSE, out, lse,
      dout, dq, dk, dv));
  TK_BIND_KERNEL(m, block_sparse_forward, BlockSparseForwardParams);
  TK_BIND_KERNEL(m, block_sparse_backward, BlockSparseBackwardParams);
  TK_BIND_KERNEL(m, block_select, BlockSelectParams);
  bind_params<tk::BranchGatesParams>(m, "BranchGatesParams", TK_FIELDS(tk::BranchGatesParams, dtype, rows, value_dim, branch0, branch1, branch2, gates,
      out, dout, dbranches, dgates, threads));
  TK_BIND_KERNEL(m, branch_gates, tk::BranchGatesParams);
#define TK_MOE dtype, activation, weight_on_input, in_out, limit, tokens, hidden, inner, experts, top_k, threads, x, x_stride, w1, w2, \
      w1_stride, w2_stride, b1, b2, weights, chosen
  using tk::MoePackParams, tk::MoeForwardParams, tk::MoeBackwardParams;
  bind_params<MoePackParams>(m, "MoePackParams", TK_FIELDS(MoePackParams, TK_MOE, packed1, packed2, bytes));
  bind_params<MoeForwardParams>(m, "MoeForwardParams", TK_FIELDS(MoeForwardParams, TK_MOE, packed1, packed2, y, z));
  bind_params<MoeBackwardParams>(m, "MoeBackwardParams", TK_FIELDS(MoeBackwardParams, TK_MOE, dy, z, dx, dw1, dw2, db1, db2, dweights));
  TK_BIND_KERNEL(m, moe_pack, MoePackParams);
  TK_BIND_KERNEL(m, moe_forward, MoeForwardParams);
  TK_BIND_KERNEL(m, moe_backward, MoeBackwardParams);
#define TK_ROUTE dtype, score, renormalize, tokens, experts, top_k, scaling, threads, logits, stride
  using tk::RouteForwardParams, tk::RouteBackwardParams;
  bind_params<RouteForwardParams>(m, "RouteForwardParams", TK_FIELDS(RouteForwardParams, TK_ROUTE, groups, top_groups, group_max,
      bias, replay, chosen, weights, counts, order, offsets));
  bind_params<RouteBackwardParams>(m, "RouteBackwardParams", TK_FIELDS(RouteBackwardParams, TK_ROUTE, chosen, dweights, dlogits));
  TK_BIND_KERNEL(m, route_forward, RouteForwardParams);
  TK_BIND_KERNEL(m, route_backward, RouteBackwardParams);

#ifdef TK_WITH_CUDA
  m.def("topk_cuda_workspace_bytes", &tk::cuda::topk_workspace_bytes, "The scratch that topk_cuda wants for these sizes.");
  using tk::PolicyLossCudaParams, tk::GroupAdvantagesCudaParams;
  bind_params<PolicyLossCudaParams>(m, "PolicyLossCudaParams", TK_FIELDS(PolicyLossCudaParams, TK_POLICY_LOSS, tokens, top,
      divisor, workspace, workspace_bytes));
  bind_params<GroupAdvantagesCudaParams>(m, "GroupAdvantagesCudaParams", TK_FIELDS(GroupAdvantagesCudaParams, TK_ADVANTAGES,
      order, ends, scratch));
  m.def("policy_loss_cuda_workspace_bytes", &tk::cuda::policy_loss_workspace_bytes, "The scratch that policy_loss_cuda wants.");
  m.def("policy_loss_cuda", &tk::cuda::policy_loss, "Enqueues policy_loss on a raw CUDA stream.", py::call_guard<py::gil_scoped_release>());
  m.def("group_advantages_cuda", &tk::cuda::group_advantages, "Enqueues group_advantages.", py::call_guard<py::gil_scoped_release>());
  m.def("logprob_forward_cuda", &tk::cuda::logprob_forward, "Enqueues logprob.", py::call_guard<py::gil_scoped_release>());
  m.def("logprob_backward_cuda", &tk::cuda::logprob_backward, "Enqueues logprob's gradient.", py::call_guard<py::gil_scoped_release>());
  bind_params<tk::RouteForwardCudaParams>(m, "RouteForwardCudaParams", TK_FIELDS(tk::RouteForwardCudaParams, TK_ROUTE, groups, top_groups,
      group_max, bias, replay, chosen, weights, counts, order, offsets, workspace, workspace_bytes));
  m.def("route_cuda_workspace_bytes", &tk::cuda::route_workspace_bytes, "The scratch that route_forward_cuda wants.");
  m.def("route_forward_cuda", &tk::cuda::route_forward, "Enqueues route.", py::call_guard<py::gil_scoped_release>());
  m.def("route_backward_cuda", &tk::cuda::route_backward, "Enqueues route's gradient.", py::call_guard<py::gil_scoped_release>());
  m.def("topk_cuda", &tk::cuda::topk, "Enqueues top-k on a raw CUDA stream.", py::call_guard<py::gil_scoped_release>());
#endif
  m.attr("cuda_left_out") = TK_CUDA_WHY;  // "" when the CUDA half is in
}
