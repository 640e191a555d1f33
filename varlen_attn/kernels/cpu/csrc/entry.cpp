// The functions that Python calls, and the choice of instruction set and of matrix products when the library is loaded.

#include <cstring>

#include "attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#define VARLEN_LEVELS(do) do(baseline) do(avx2) do(avx512)
#else
#define VARLEN_LEVELS(do) do(baseline)
#endif

namespace varlen {

#define VARLEN_DECLARE(name) \
  namespace name {           \
  extern const Level level;  \
  }
VARLEN_LEVELS(VARLEN_DECLARE)

namespace {

#define VARLEN_LIST(name) &name::level,
const Level* const kLevels[] = {VARLEN_LEVELS(VARLEN_LIST)};

// What this CPU and its system can do. Asked of the CPU itself, because not every compiler brings the functions of `__builtin_cpu_supports`.
// ATEN_CPU_CAPABILITY, by which a user holds torch to less, holds for the kernel too.
struct Cpu {
  int64_t level = 0;  // the best of kLevels
  bool bf16 = false;  // products of bfloat16

#if defined(__x86_64__)
  Cpu() {
    uint32_t a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    constexpr uint32_t fma = 1u << 12, movbe = 1u << 22, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if (~c & (fma | movbe | osxsave | avx | f16c)) return;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));  // the registers that the system saves
    if (~saved & 0x6 || !__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c & 1u << 5)) return;  // lzcnt
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr uint32_t bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
    if (~b & (bmi1 | avx2 | bmi2)) return;
    const char* given = std::getenv("ATEN_CPU_CAPABILITY");
    const auto is = [given](const char* name) { return given && std::strcmp(given, name) == 0; };
    if (is("default")) return;
    level = 1;
    if (is("avx2")) return;
    constexpr uint32_t f = 1u << 16, dq = 1u << 17, cd = 1u << 28, bw = 1u << 30, vl = 1u << 31;
    if (~saved & 0xe6 || ~b & (f | dq | cd | bw | vl)) return;
    level = 2;
    bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 5;
  }
#endif
};

const Cpu cpu;
Torch torch{};

// Whether a product runs here and gives what it should: an exported symbol is no promise that this CPU can. What it throws is caught by
// `parallel_for`.
template <class T>
bool works(const Torch& given, Gemm<T> product, T one) {
  struct Trial {
    const Torch& given;
    Gemm<T> product;
    T a[16 * 16], b[16 * 16];
    float c[16 * 16];
  } trial{given, product, {}, {}, {}};
  std::fill(trial.a, trial.a + 256, one), std::fill(trial.b, trial.b + 256, one), std::fill(trial.c, trial.c + 256, 1.0f);
  const auto run = [](int64_t, int64_t, void* all) {
    Trial& t = *static_cast<Trial*>(all);
    constexpr bool half = sizeof(T) == 2;
    t.product(16, 16, 16, 16, 16, 16, true, t.a, t.b, t.c, half);
    t.given.release(half);
  };
  return given.parallel_for(0, 1, 1, run, &trial) == 0 && std::all_of(trial.c, trial.c + 256, [](float x) { return x == 17.0f; });
}

void bind(Torch given) {
  const bool products = cpu.level && given.parallel_for && given.release;
  if (!products || !given.f32 || !works<float>(given, given.f32, 1.0f)) given.f32 = nullptr, given.release = nullptr;
  // Without instructions for it, a product in bfloat16 is slower than one in float32.
  if (!given.f32 || !given.bf16 || !cpu.bf16 || !works<uint16_t>(given, given.bf16, 0x3f80)) given.bf16 = nullptr;
  torch = given;
}

thread_local const char* last_error = "";

// Offsets that reach beyond the tensors would be read and written beyond: never, whatever was promised about them.
const char* wrong_offsets(const int32_t* offsets, int64_t num_seqs, int64_t rows, bool slack) {
  if (offsets[0] != 0) return "offsets must start at 0";
  for (int64_t s = 0; s < num_seqs; s++)
    if (offsets[s + 1] < offsets[s]) return "offsets must not decrease";
  if (offsets[num_seqs] > rows) return "offsets must not end beyond the packed rows";
  return offsets[num_seqs] < rows && !slack ? "offsets must not end before the packed rows" : nullptr;
}

// Sizes and sides that the kernel's arithmetic is not made for, and tensors without memory.
bool fits(const Args& a) {
  const bool sizes = a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.dim > 0 && a.dim % 16 == 0 && a.value_dim > 0 && a.value_dim % 16 == 0;
  const bool sides = std::min(a.low, a.high) >= -kUnlimited && std::max(a.low, a.high) <= kUnlimited;
  return sizes && sides && (a.rows_q == 0 || a.q) && (a.rows_k == 0 || (a.k && a.v));
}

const Level& level_of(int64_t wanted) { return *kLevels[wanted < 0 || wanted > cpu.level ? cpu.level : wanted]; }

int failed(const char* why, int status) { return last_error = why, status; }

// 0, 2 for wrong offsets, 1 for all else.
int run(Args args, bool backward) {
  if (args.num_seqs < 0 || !args.cu_q || !args.cu_k) return failed("offsets must have an entry", 2);
  // Offsets of its own, which nobody writes to once they are checked.
  const int64_t count = args.num_seqs + 1;
  const Memory<int32_t> offsets = allocate<int32_t>(2 * count);
  if (!offsets) return failed(kNoMemory, 1);
  std::copy(args.cu_q, args.cu_q + count, offsets.get()), std::copy(args.cu_k, args.cu_k + count, offsets.get() + count);
  args.cu_q = offsets.get(), args.cu_k = offsets.get() + count;
  for (const char* wrong : {wrong_offsets(args.cu_q, args.num_seqs, args.rows_q, args.slack_q), wrong_offsets(args.cu_k, args.num_seqs, args.rows_k, args.slack_k)})
    if (wrong) return failed(wrong, 2);
  if (!fits(args)) return failed("sizes must be multiples of 16, heads of key/value heads, and tensors have memory", 1);
  const Level& level = level_of(args.level);
  const char* why = (backward ? level.backward : level.forward)(args, torch);
  return why ? failed(why, 1) : 0;
}

}  // namespace
}  // namespace varlen

extern "C" {
#pragma GCC visibility push(default)

void varlen_bind(const varlen::Torch* functions) { varlen::bind(*functions); }
int varlen_forward(const varlen::Args* args) { return varlen::run(*args, false); }
int varlen_backward(const varlen::Args* args) { return varlen::run(*args, true); }
int varlen_differs(const varlen::Mask* mask) { return varlen::level_of(mask->level).differs(*mask, varlen::torch); }
const char* varlen_last_error() { return varlen::last_error; }
int64_t varlen_args_size() { return sizeof(varlen::Args); }
int64_t varlen_level() { return varlen::cpu.level; }

// What multiplies matrices: 0 the kernel's own code, 1 libtorch's for float32, 3 libtorch's for float32 and bfloat16.
int64_t varlen_products() { return (varlen::torch.f32 ? 1 : 0) + (varlen::torch.bf16 ? 2 : 0); }

#pragma GCC visibility pop
}
