/* Makes reads of experts fail or slow, in a running server's stages: preloaded by test_disk.py. Linux with glibc.

   A file that every process maps says how: from the next call on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

struct control {
  atomic_long failing;    /* calls that still fail */
  atomic_long delay_us;   /* of every call */
  atomic_long calls;
};

static struct control *control;

__attribute__((constructor)) static void map_control(void) {
  const char *path = getenv("EXO_KIMI_DISK");
  int file = path ? open(path, O_RDWR) : -1;
  if (file < 0) return;
  void *found = mmap(0, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (found != MAP_FAILED) control = found;
}

static int fails(void) {
  if (!control) return 0;
  atomic_fetch_add(&control->calls, 1);
  long delay_us = atomic_load(&control->delay_us);
  if (delay_us > 0) usleep(delay_us);
  if (atomic_load(&control->failing) <= 0) return 0;
  return atomic_fetch_sub(&control->failing, 1) > 0;
}

#define READ(name, ...)                                                       \
  {                                                                           \
    static __typeof__(&name) real;                                            \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);             \
    if (fails()) {                                                            \
      errno = EIO;                                                            \
      return -1;                                                              \
    }                                                                         \
    return real(__VA_ARGS__);                                                 \
  }

ssize_t preadv(int file, const struct iovec *parts, int count, off_t at) READ(preadv, file, parts, count, at)
ssize_t preadv64(int file, const struct iovec *parts, int count, off64_t at) READ(preadv64, file, parts, count, at)
ssize_t preadv2(int file, const struct iovec *parts, int count, off_t at, int flags)
  READ(preadv2, file, parts, count, at, flags)
ssize_t preadv64v2(int file, const struct iovec *parts, int count, off64_t at, int flags)
  READ(preadv64v2, file, parts, count, at, flags)
