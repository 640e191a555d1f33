// Preloaded: makes one allocation fail, the `nth` of at least `least` bytes since `failing_arm`, in the thread that called it. With -1 none
// fails; they are counted.
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t), *__libc_memalign(size_t, size_t);

static atomic_long seen, nth = -1;
static atomic_size_t least = (size_t)-1;
static pthread_t thread;

void failing_arm(long number, size_t bytes) { least = (size_t)-1, thread = pthread_self(), nth = number, seen = 0, least = bytes; }
long failing_seen(void) { return seen; }

static int fails(size_t size) { return size >= least && pthread_equal(thread, pthread_self()) && atomic_fetch_add(&seen, 1) == nth; }
static void* none(void) { return errno = ENOMEM, NULL; }

void* malloc(size_t size) { return fails(size) ? none() : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails(count * size) ? none() : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return fails(size) ? none() : __libc_realloc(old, size); }
void* memalign(size_t align, size_t size) { return fails(size) ? none() : __libc_memalign(align, size); }
void* aligned_alloc(size_t align, size_t size) { return memalign(align, size); }
int posix_memalign(void** result, size_t align, size_t size) {
  void* memory = memalign(align, size);
  if (memory) *result = memory;
  return memory ? 0 : ENOMEM;
}
