// Holds OpenVINO's CPU plugin to AVX2 on a CPU that has more: preloaded, it answers the questions about the
// CPU that the plugin asks of libopenvino.so. oneDNN inside the plugin asks the CPU itself: ONEDNN_MAX_CPU_ISA.
namespace ov {
bool with_cpu_x86_bfloat16() { return false; }
bool with_cpu_x86_avx2_vnni() { return false; }
bool with_cpu_x86_avx2_vnni_2() { return false; }
bool with_cpu_x86_avx512f() { return false; }
bool with_cpu_x86_avx512_core() { return false; }
bool with_cpu_x86_avx512_core_vnni() { return false; }
bool with_cpu_x86_avx512_core_fp16() { return false; }
bool with_cpu_x86_avx512_core_amx() { return false; }
bool with_cpu_x86_avx512_core_amx_int8() { return false; }
bool with_cpu_x86_avx512_core_amx_bf16() { return false; }
bool with_cpu_x86_avx512_core_amx_fp16() { return false; }
}  // namespace ov
