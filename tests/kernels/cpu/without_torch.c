// What `make dist` runs for each Linux wheel, in an emulator where there is one: forward and backward at every instruction set of a CPU without
// torch's threads and products, against the formulas in double precision. `without_torch KERNEL`, and the last line is OK or WRONG.

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"

enum { kRows = 457, kHeads = 2, kDim = 32, kSeqs = 4, kCount = kRows * kHeads * kDim };
static const int32_t offsets[] = {0, 3, 3, 140, kRows}, wrong[] = {0, 9, 3, 140, kRows};
static float q[kCount], k[kCount], v[kCount], grad[kCount], results[4][kCount], lse[kRows * kHeads];
static double wanted[4][kCount];

static double dot(const float* a, const float* b) {
  double sum = 0;
  for (int c = 0; c < kDim; c++) sum += (double)a[c] * b[c];
  return sum;
}

static void formulas(int causal) {
  const double scale = 1 / sqrt(kDim);
  double weights[kRows];
  memset(wanted, 0, sizeof wanted);
  for (int s = 0; s < kSeqs; s++)
    for (int h = 0; h < kHeads; h++)
      for (int i = offsets[s]; i < offsets[s + 1]; i++) {
        const int row = (i * kHeads + h) * kDim, end = causal ? i + 1 : offsets[s + 1];
        double most = -INFINITY, sum = 0, delta = 0;
        for (int j = offsets[s]; j < end; j++) most = fmax(most, weights[j] = scale * dot(q + row, k + (j * kHeads + h) * kDim));
        for (int j = offsets[s]; j < end; j++) sum += weights[j] = exp(weights[j] - most);
        for (int j = offsets[s]; j < end; j++) {
          weights[j] /= sum;
          for (int c = 0; c < kDim; c++) wanted[0][row + c] += weights[j] * v[(j * kHeads + h) * kDim + c];
        }
        for (int c = 0; c < kDim; c++) delta += wanted[0][row + c] * grad[row + c];
        for (int j = offsets[s]; j < end; j++) {
          const int at = (j * kHeads + h) * kDim;
          const double d = weights[j] * (dot(grad + row, v + at) - delta) * scale;
          for (int c = 0; c < kDim; c++) {
            wanted[1][row + c] += d * k[at + c];
            wanted[2][at + c] += d * q[row + c];
            wanted[3][at + c] += weights[j] * grad[row + c];
          }
        }
      }
}

int main(int count, char** names) {
  void* kernel = count > 1 ? dlopen(names[1], RTLD_NOW) : NULL;
  if (!kernel) return puts(count > 1 ? dlerror() : "without_torch KERNEL"), 1;
  int (*forward)(const Args*) = dlsym(kernel, "varlen_forward"), (*backward)(const Args*) = dlsym(kernel, "varlen_backward");
  int64_t (*level)(void) = dlsym(kernel, "varlen_level"), (*size)(void) = dlsym(kernel, "varlen_args_size");
  int failed = size() != sizeof(Args);
  for (int i = 0; i < kCount; i++)
    for (int t = 0; t < 4; t++) (t == 0 ? q : t == 1 ? k : t == 2 ? v : grad)[i] = 3.0f * rand() / RAND_MAX - 1.5f;
  const int64_t row = kHeads * kDim, far = (int64_t)1 << 40;
  Args args = {q, k, v, results[0], lse, grad, results[1], results[2], results[3], NULL, offsets, offsets, NULL, NULL, row, kDim, row, kDim,
               row, kDim, row, kDim, kSeqs, kRows, kRows, kHeads, kHeads, kDim, kDim, 0, -far, far, 1, 0, 1, 1, 1 / sqrt(kDim), 0, 0, 0, 0};
  for (int causal = 0; causal < 2; causal++) {
    formulas(causal);
    args.high = causal ? 0 : far;
    for (args.level = 0; args.level <= level(); args.level++) {
      double error = forward(&args) || backward(&args) ? INFINITY : 0;
      for (int t = 0; t < 4; t++)
        for (int i = 0; i < kCount; i++)
          if (!(fabs(results[t][i] - wanted[t][i]) <= error)) error = fabs(results[t][i] - wanted[t][i]);
      printf("instruction set %d, %s: error %.1e\n", (int)args.level, causal ? "causal" : "all keys", error);
      failed |= !(error < 1e-5);
    }
  }
  args.cu_q = wrong;
  failed |= forward(&args) != 2;
  return puts(failed ? "WRONG" : "OK"), failed;
}
