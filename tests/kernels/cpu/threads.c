// What `make sanitize` runs under the thread sanitizer: the compiled kernel, forward and backward, with threads of its own in place of torch's,
// called by two threads at once on the same inputs. `threads KERNEL`, and the last line is OK or WRONG.

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"

enum { kThreads = 4, kCallers = 2, kRows = 457, kHeads = 4, kDim = 32, kSeqs = 4, kCount = kRows * kHeads * kDim };
static const int32_t offsets[] = {0, 3, 3, 140, kRows};
static const float slopes[kHeads] = {0.5f, 0.25f, 0.1f, 0.0f}, sinks[kHeads] = {1.0f, 0.0f, -1.0f, 0.5f};
static float q[kCount], k[kCount], v[kCount], grad[kCount];
static int (*forward)(const Args*), (*backward)(const Args*);
static int threads = 1;

typedef struct {
  void (*work)(int64_t, int64_t, void*);
  void* all;
} Part;

static void* part(void* given) { return ((Part*)given)->work(0, 1, ((Part*)given)->all), NULL; }

static int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*), void* all) {
  Part each = {work, all};
  pthread_t started[kThreads];
  const int count = end - begin < threads ? (int)(end - begin) : threads;
  (void)grain;
  for (int i = 1; i < count; i++) pthread_create(&started[i], NULL, part, &each);
  part(&each);
  for (int i = 1; i < count; i++) pthread_join(started[i], NULL);
  return 0;
}

static int32_t num_threads(uint32_t* count) { return *count = (uint32_t)threads, 0; }

typedef struct {
  float results[4][kCount], lse[kHeads * kRows], dsinks[kSeqs * kHeads];
  int failed;
} Results;
static Results alone, callers[kCallers];

static void* call(void* given) {  // every kind of call; the results are those of the last
  Results* r = given;
  const int64_t row = kHeads * kDim, far = (int64_t)1 << 40;
  for (int kind = 0; kind < 16; kind++) {
    const int grouped = kind & 1, kv_heads = grouped ? kHeads / 2 : kHeads;
    Args args = {q, k, v, r->results[0], r->lse, grad, r->results[1], r->results[2], r->results[3], r->dsinks, offsets, offsets, kind & 2 ? slopes : NULL,
                 sinks, row, kDim, row, kDim, row, kDim, row, kDim, kSeqs, kRows, kRows, kHeads, kv_heads, kDim, kDim, 0, kind & 4 ? -20 : -far,
                 kind & 4 ? 0 : far, 1, 7, 1, 1, 1 / sqrt(kDim), kind & 8 ? 3.0 : 0, kind & 8 ? 0.1 : 0, -1, 1};
    r->failed |= forward(&args) || backward(&args);
  }
  return NULL;
}

int main(int count, char** names) {
  void* kernel = count > 1 ? dlopen(names[1], RTLD_NOW) : NULL;
  if (!kernel) return puts(count > 1 ? dlerror() : "threads KERNEL"), 1;
  forward = dlsym(kernel, "varlen_forward"), backward = dlsym(kernel, "varlen_backward");
  void (*bind)(void* const*) = dlsym(kernel, "varlen_bind");
  int64_t (*size)(void) = dlsym(kernel, "varlen_args_size");
  int failed = size() != sizeof(Args);
  for (int i = 0; i < kCount; i++)
    for (int t = 0; t < 4; t++) (t == 0 ? q : t == 1 ? k : t == 2 ? v : grad)[i] = 3.0f * rand() / RAND_MAX - 1.5f;
  void* const functions[] = {(void*)parallel_for, (void*)num_threads, NULL, NULL, NULL};
  bind(functions);
  call(&alone);
  threads = kThreads;
  pthread_t started[kCallers];
  for (int i = 0; i < kCallers; i++) pthread_create(&started[i], NULL, call, &callers[i]);
  for (int i = 0; i < kCallers; i++) pthread_join(started[i], NULL);
  for (int i = 0; i < kCallers; i++) failed |= callers[i].failed || memcmp(callers[i].results, alone.results, sizeof alone.results) != 0;
  return puts(failed || alone.failed ? "WRONG" : "OK"), failed || alone.failed;
}
