"""vLLM's engine arguments (0.33, and those of 2024 and 2025 since removed): flags, keywords of LLM.

Names that vLLM and Sensorium share are fields of ``sensorium.config`` and are not listed.
"""

from __future__ import annotations

from typing import Any

from sensorium.compat.rule import Convert, Effect, Rule, ignored, one_of, refused, same
from sensorium.errors import ConfigError

_ONE_DEVICE = "a model runs on one machine; its ranks are processes that find each other, and each takes its cores"
_NO_STAGES = "layers are not spread over devices: --tensor-parallel-size divides every layer between processes"
_ONE_MACHINE = (
    "a model runs on one machine; start one server per machine and balance the load between them"
)
_NO_GRAPHS = "nothing is compiled by torch, and which steps are captured is decided by themselves"
_KERNELS = "kernels are chosen by hardware and model"
_NO_LORA = "no such form of adapters is available; merge the adapter into the weights"
_LORA = "adapters that are loaded stay in memory, in the data type of the model"
_NO_DRAFTS = "speculative decoding takes tokens from the text itself (ngram), not from a model"
_ADAPTIVE = "tokens are tried where measurements say that it pays"
MOST_SPECULATIVE_TOKENS = 16
"""Most tokens that are tried at a time; vLLM knows no limit."""
_NO_TRANSFER = "KV and encoder caches stay in one process"
_NO_PLUGINS = "plugins cannot be loaded into the engine"
_LOADING = "weight files are memory-mapped as they are"
_SCHEDULING = "all requests share one token budget per step, --max-num-batched-tokens"
_METRICS = "metrics are always on; docs/metrics.md lists them"
_STATE_SPACE = "models with state-space or linear-attention layers are not supported"
_EXPERTS = "all experts run on one device, in the model's own code"
_CACHED_MEDIA = "preprocessed media are kept in shared memory, up to --mm-processor-cache-gb"


def _no_modalities(value: Any) -> dict[str, Any]:
    return {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}} if value else {}


def _pools_alike(value: Any) -> bool:
    """Return true for last-token pooling and embeddings of length 1, Sensorium's behaviour."""
    last = {"pooling_type", "seq_pooling_type"}
    scaled = {"normalize", "use_activation"}
    return isinstance(value, dict) and all(
        (key in last and str(member).upper() == "LAST") or (key in scaled and member is True)
        for key, member in value.items()
    )


def _speculation(value: Any) -> dict[str, Any]:
    """Return the options for vLLM's speculative_config. Raises ConfigError for other methods."""
    if not isinstance(value, dict):
        raise TypeError(f"not an object: {value!r}")
    if not value:
        return {}
    options = _method(value.get("method") or value.get("model"))
    if value.get("num_speculative_tokens") is not None:
        options |= _num_tokens(value["num_speculative_tokens"])
    for name in ("prompt_lookup_min", "prompt_lookup_max"):
        if value.get(name) is not None:
            options[name] = int(value[name])
    if "prompt_lookup_max" in options:
        options.setdefault("prompt_lookup_min", min(3, options["prompt_lookup_max"]))
    return options


def _method(value: Any) -> dict[str, Any]:
    if str(value).strip("[]") not in ("ngram", "ngram_gpu", "suffix"):
        raise ConfigError(
            f"Speculative decoding with {value!r} is not supported: {_NO_DRAFTS}.",
            param="speculative_config",
        )
    return {"speculative": "ngram"}


def _num_tokens(value: Any) -> dict[str, Any]:
    return {"num_speculative_tokens": min(int(value), MOST_SPECULATIVE_TOKENS)}


def _lookup(name: str) -> Convert:
    return lambda value: {name: int(value)}


def _encoder_ranks(value: Any) -> dict[str, Any]:
    """Return the option for vLLM's mm_encoder_tp_mode. Raises ConfigError for other modes."""
    if value not in ("weights", "data"):
        raise ConfigError(
            f"mm_encoder_tp_mode must be weights or data, got {value!r:.80}.",
            param="mm_encoder_tp_mode",
        )
    return {"encoder_ranks": "all"} if value == "data" else {}


SAME = [
    same(
        "mm_encoder_tp_mode",
        "encoder_ranks",
        _encoder_ranks,
        "data: each rank encodes its share of the items; weights: the first rank alone encodes",
    ),
    same(
        "speculative_config",
        "speculative, num_speculative_tokens, prompt_lookup_min, prompt_lookup_max",
        _speculation,
        "methods ngram and suffix; at most 16 tokens at a time",
        takes="json",
    ),
    same("spec_method", "speculative", _method, "ngram, or suffix"),
    same("spec_model", "speculative", _method, "ngram only"),
    same("spec_tokens", "num_speculative_tokens", _num_tokens, "at most 16"),
    same("speculative_model", "speculative", _method, "[ngram] only"),
    same(
        "ngram_prompt_lookup_max",
        "prompt_lookup_max",
        _lookup("prompt_lookup_max"),
        "the longest repetition that is compared",
    ),
    same(
        "ngram_prompt_lookup_min",
        "prompt_lookup_min",
        _lookup("prompt_lookup_min"),
        "the shortest repetition that counts",
    ),
    same(
        "device_memory_utilization",
        "gpu_memory_utilization",
        lambda value: {"gpu_memory_utilization": float(value)},
        "fraction of the device's memory",
    ),
    same(
        "num_gpu_blocks_override",
        "num_kv_blocks",
        lambda value: {"num_kv_blocks": int(value)},
        "number of KV cache blocks",
    ),
    same(
        "disable_mm_preprocessor_cache",
        "mm_processor_cache_gb 0",
        lambda value: {"mm_processor_cache_gb": 0.0} if value else {},
        "no cache of preprocessed media",
        takes="switch",
    ),
    same(
        "language_model_only",
        "limit_mm_per_prompt 0 for each modality",
        _no_modalities,
        "media are refused and no encoder is loaded",
        takes="switch",
    ),
    same(
        "max_num_queued_reqs",
        "max_num_waiting",
        lambda value: {"max_num_waiting": max(1, int(value))},
        "beyond it, 503 with Retry-After; counts samples, not requests",
    ),
    same(
        "rope_scaling",
        "hf_overrides",
        lambda value: {"hf_overrides": {"rope_scaling": value}},
        "replaces the value in config.json",
        takes="json",
    ),
    same(
        "rope_theta",
        "hf_overrides",
        lambda value: {"hf_overrides": {"rope_theta": value}},
        "replaces the value in config.json",
    ),
]  # fmt: skip

IGNORED = [
    *ignored(
        _NO_GRAPHS, compilation_config={}, optimization_level=2, performance_mode="balanced",
        cudagraph_capture_sizes=[], cuda_graph_sizes=[], max_cudagraph_capture_size=None,
        max_seq_len_to_capture=8192, use_cudagraph=True,
    ),
    *ignored(
        _KERNELS, attention_backend=None, attention_config={}, kernel_config={}, ir_op_priority={},
        enable_flashinfer_autotune=True, monokernel=False, linear_backend="auto",
        sparse_indexer_topk_backend="auto", gdn_prefill_backend=None, kda_prefill_backend=None,
        kda_decode_backend=None, disable_cascade_attn=False, use_fp64_gumbel=False,
        mm_encoder_attn_backend=None, jit_monitor_mode="warn", jit_monitor_verbose=False,
    ),
    *ignored("there is no swapping: a preempted request is "
             "recomputed", swap_space=4, preemption_mode=None),
    *ignored(
        _SCHEDULING, async_scheduling=False, num_scheduler_steps=1, multi_step_stream_outputs=True,
        scheduler_delay_factor=0.0, max_num_partial_prefills=1, max_long_partial_prefills=1,
        long_prefill_token_threshold=0, long_prefill_token_threshold_adaptive=False, num_lookahead_slots=0,
        max_num_scheduled_tokens=None, max_num_active_seqs=None, scheduler_reserve_full_isl=True, watermark=0.0,
        prefill_schedule_interval=1, disable_chunked_mm_input=False, disable_async_output_proc=False,
    ),
    *ignored("requests are ordered by priority, then by arrival", scheduling_policy="fcfs"),
    *ignored(
        _ONE_DEVICE, distributed_executor_backend=None, disable_custom_all_reduce=False, worker_use_ray=False,
        ray_workers_use_nsight=False, engine_use_ray=False, numa_bind=False,
        numa_bind_nodes=[], numa_bind_cpus=[], distributed_timeout_seconds=None, cpu_distributed_timeout_seconds=None,
        master_addr="127.0.0.1", master_port=29501, data_parallel_backend="mp", data_parallel_address=None,
        data_parallel_rpc_port=None, dcp_comm_backend=None, dcp_q_replicate=False, dcp_kv_cache_interleave_size=1,
        cp_kv_cache_interleave_size=None, enable_shm_tensor_arena=False, disable_nccl_for_dp_synchronization=False,
        dp_sync_interval=16, enable_batch_sharded_sampling=False, enable_hc_sp=False, enable_dbo=False, ubatch_size=0,
        dbo_decode_token_threshold=32, dbo_prefill_token_threshold=512, enable_nccl_comm_suspend=False,
        enable_cumem_allocator=False, fault_tolerance_config={}, watchdog_config={},
    ),
    *ignored(
        _EXPERTS, enable_expert_parallel=False, enable_eplb=False, eplb_config={}, moe_backend="auto",
        all2all_backend="allgather_reducescatter", expert_placement_strategy="linear", enable_ep_weight_filter=False,
        num_redundant_experts=0, enable_elastic_ep=False, elastic_ep_max_dp_size=None,
    ),
    *ignored(
        _LOADING, use_tqdm_on_load=True, pt_load_map_location="cpu", ignore_patterns=[], model_loader_extra_config={},
        safetensors_load_strategy=None, safetensors_prefetch_num_threads=None, safetensors_prefetch_block_size=None,
        max_parallel_loading_workers=None,
    ),
    *ignored(
        _ADAPTIVE, speculative_disable_by_batch_size=None, speculative_disable_mqa_scorer=False,
        spec_decoding_acceptance_method="rejection_sampler", disable_logprobs_during_spec_decoding=False,
    ),
    *ignored("no code of a checkpoint is executed", code_revision=None),
    *ignored(
        _CACHED_MEDIA, mm_processor_cache_type="lru", mm_shm_cache_max_object_size_mb=128, mm_tensor_ipc="direct_rpc",
        mm_ipc_gpu_memory_gb=0, mm_hasher_algorithm="blake3", mm_processor_device="auto", mm_device_do_normalize=False,
        renderer_num_workers=1, mm_encoder_attn_dtype=None, mm_encoder_fp8_scale_path=None,
        mm_encoder_fp8_scale_save_path=None, mm_encoder_fp8_scale_save_margin=1.5,
    ),
    *ignored("memory for media is derived from the configuration", skip_mm_profiling=False),
    *ignored(
        _LORA, max_cpu_loras=None, lora_dtype="auto", fully_sharded_loras=False, lora_extra_vocab_size=256,
        specialize_active_lora=False, enable_tower_connector_lora=False, enable_mixed_moe_lora_format=False,
        enable_moe_shared_loras=False, max_lora_cls_labels=None,
    ),
    *ignored(
        "all constraints use one backend; JSON is compact and objects have no additional "
        "properties",
        guided_decoding_backend="auto", structured_outputs_config={}, guided_decoding_disable_fallback=False,
        guided_decoding_disable_any_whitespace=False, guided_decoding_disable_additional_properties=False,
    ),
    *ignored(
        "reasoning is always split from the content; --reasoning-parser chooses its form",
        reasoning_parser_plugin="", reasoning_config={}, enable_reasoning=False,
    ),
    *ignored(
        _METRICS, show_hidden_metrics_for_version=None, kv_cache_metrics=False, kv_cache_metrics_sample=0.01,
        cudagraph_metrics=False, enable_mfu_metrics=False, enable_mm_processor_stats=False,
        enable_logging_iteration_details=False, enable_layerwise_nvtx_tracing=False, aggregate_engine_logging=False,
        per_request_spec_decode_metrics="none", profiler_config={},
    ),
    *ignored(
        _STATE_SPACE, mamba_cache_dtype="auto", mamba_ssm_cache_dtype="auto", mamba_block_size=None, mamba_config={},
        mamba_backend="triton", mamba_ssu_algorithm=None, mamba_cache_mode=None, mamba_cache_philox_rounds=None,
        enable_mamba_cache_stochastic_rounding=False, enable_mamba_shared_prefix_checkpoint=False,
        replayssm_buffer_len=16, use_replayssm=False,
    ),
    *ignored(
        "blocks are keyed by SHA-256 and evicted least recently used "
        "first", prefix_caching_hash_algo="sha256",
        prefix_cache_retention_interval=0, prefix_match_unit=None, use_v2_block_manager=True,
        disable_hybrid_kv_cache_manager=False, kv_sharing_fast_prefill=False, swa_bounded_replay=True,
    ),
    *ignored(
        "chosen automatically", tokenizer_pool_size=0, tokenizer_pool_type="ray",
        tokenizer_pool_extra_config={}, intial_incremental_detokenization_offset=5, fail_on_environ_validation=False,
    ),
    *ignored("scales of an int8 KV cache are made as tokens are "
             "written, in all layers", calculate_kv_scales=False, kv_cache_dtype_skip_layers=[]),
    *ignored("chunks are sent as soon as there are tokens", stream_interval=1),
    *ignored("the content of requests is never "
             "logged", disable_log_requests=False, enable_log_requests=False),
]  # fmt: skip

REFUSED = [
    *refused(
        _NO_STAGES, pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1,
    ),
    *refused(
        _ONE_MACHINE, nnodes=1,
        node_rank=0, data_parallel_rank=None, data_parallel_start_rank=None, data_parallel_size_local=None,
        data_parallel_hybrid_lb=False, data_parallel_external_lb=False, data_parallel_multi_port_external_lb=False,
        enable_fault_tolerance=False,
    ),
    *refused("choose the device with --device or CUDA_VISIBLE_DEVICES", device_ids=None),
    *refused(
        "weights and KV cache must fit into the device's "
        "memory", cpu_offload_gb=0, cpu_offload_params=[],
        offload_backend="auto", offload_group_size=0, offload_num_in_group=1, offload_prefetch_step=1,
        offload_params=[], kv_offloading_size=None, kv_offloading_backend="native",
    ),
    *refused(
        _NO_LORA, enable_lora_bias=False, long_lora_scaling_factors=None, lora_target_modules=[], default_mm_loras=None,
        enable_prompt_adapter=False, max_prompt_adapters=1, max_prompt_adapter_token=0,
        qlora_adapter_name_or_path=None,
    ),
    *refused(
        _NO_DRAFTS, speculative_draft_tensor_parallel_size=None, speculative_max_model_len=None,
        speculative_model_quantization=None,
    ),
    *refused(
        _NO_TRANSFER, kv_transfer_config=None, kv_events_config=None, ec_transfer_config=None, ec_manager_config={},
        weight_transfer_config=None, mm_encoder_only=False,
    ),
    *refused(
        _NO_PLUGINS, worker_cls="auto", worker_extension_cls="", scheduler_cls=None, logits_processors=[],
        logits_processor_pattern=None, io_processor_plugin=None, model_class_overrides={}, additional_config={},
        override_neuron_config={},
    ),
    *refused(
        "only tokenizers of the tokenizers library are supported "
        "(tokenizer.json)", harmless=one_of("hf", "fast"),
        tokenizer_mode="auto",
    ),
    *refused("the tokenizer has the model's revision; pass another as a folder, --tokenizer",
             tokenizer_revision=None),
    Rule("hf_token", Effect.REFUSED, "set HF_TOKEN in the environment; other users can see the "
                                     "flags of a process",
         takes="optional", harmless=one_of(True, False)),
    *refused("the tokenizer is always loaded; prompts may still be token "
             "ids", skip_tokenizer_init=False),
    *refused("only checkpoints in the layout of transformers are supported (config.json)",
             harmless=one_of("hf"), config_format="auto"),
    *refused("change values of config.json with --hf-overrides", hf_config_path=None),
    *refused("a native implementation runs the model where there is one, else transformers does",
             harmless=one_of("vllm"), model_impl="auto"),
    *refused("the model's window is kept; a --max-model-len up to its size has the same effect",
             disable_sliding_window=False),
    *refused("at most 20 log probabilities are reported per token", max_logprobs=20,
             harmless=lambda value: isinstance(value, int) and 0 <= value <= 20),
    *refused("log probabilities are the model's, before penalties and temperature",
             logprobs_mode="raw_logprobs"),
    *refused("embeddings of media are accepted (--enable-mm-embeds), those of text are not",
             enable_prompt_embeds=False),
    *refused("embeddings are those of the last token; for Matryoshka, --hf-overrides "
             "'{\"is_matryoshka\": true}'",
             harmless=_pools_alike, pooler_config={}, override_pooler_config={}),
    *refused("stop the server to free its "
             "memory", enable_sleep_mode=False, sleep_mode_backend="cumem",
             sleep_mode_offload_cudagraph=False, sleep_preserve_parameter_names=[]),
    *refused("all sampled frames reach the model; sample fewer with --media-io-kwargs",
             harmless=one_of(0, 0.0), video_pruning_rate=None, video_pruning_method="evs"),
    *refused("--otlp-traces-endpoint exports all stations of a request", collect_detailed_traces=[]),
    *refused("histogram buckets are fixed", custom_histogram_buckets=None),
    *refused("config.json says how a checkpoint is quantized", quantization_config=None,
             allow_deprecated_quantization=False),
    *refused("there is no such "
             "output", enable_return_routed_experts=False, return_sampling_mask=False,
             enable_trace_replay=False, aux_output_config={}, watermark_config=None, diffusion_config=None,
             engram_config=None),
    *refused("limit the queue with --max-num-waiting, which counts "
             "samples", max_num_queued_tokens=None),
]  # fmt: skip

ENGINE_RULES: dict[str, Rule] = {rule.name: rule for rule in (*SAME, *IGNORED, *REFUSED)}
