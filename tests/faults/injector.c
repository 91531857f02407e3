/* Makes the n-th call of a kind fail, in chosen processes: preloaded into exo-kimi and its stages by test_injected.py.

   A file that all of them map says what is to fail. Calls count from the moment a process says that it is ready (the server by
   faults_ready, a stage by binding its socket), so that imports do not. Linux with glibc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NONE, DESCRIPTOR, PROCESS, WRITE, SEND, MAP, ALLOCATION };
enum scope { SERVER = 1, STAGES = 2 };

struct control {
  int kind;
  int scope;
  atomic_long before; /* calls that still succeed */
  long failing;       /* calls in a row that fail then */
  atomic_long calls;
  atomic_long failed;
};

#define LARGE_BYTES 65536 /* smaller allocations never fail where memory is overcommitted */

static struct control *control;
static int ready;
static pid_t server; /* of this process, or of the one that it was forked from */

static int fails(enum kind kind) {
  struct control *c = control;
  if (!c || !ready || c->kind != (int)kind) return 0;
  if (!(c->scope & (getpid() == server ? SERVER : STAGES))) return 0;
  atomic_fetch_add(&c->calls, 1);
  long left = atomic_fetch_sub(&c->before, 1);
  if (left > 0 || left <= -c->failing) return 0;
  atomic_fetch_add(&c->failed, 1);
  return 1;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(number, result) do { errno = (number); return (result); } while (0)

__attribute__((constructor)) static void map_control(void) {
  const char *path = getenv("EXO_KIMI_FAULTS");
  if (!path) return;
  int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  void *found = (void *)syscall(SYS_mmap, NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (found != MAP_FAILED) control = found;
}

void faults_ready(void) {
  ready = 1;
  server = getpid();
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
  REAL(bind);
  int result = real(fd, address, length);
  if (address && address->sa_family == AF_UNIX) ready = 1;
  return result;
}

/* --- descriptors: EMFILE */
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); \
    return real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)
FILE *fopen(const char *path, const char *mode) { REAL(fopen); if (fails(DESCRIPTOR)) FAIL(EMFILE, NULL); return real(path, mode); }
FILE *fopen64(const char *path, const char *mode) { REAL(fopen64); if (fails(DESCRIPTOR)) FAIL(EMFILE, NULL); return real(path, mode); }
int socket(int a, int b, int c) { REAL(socket); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(a, b, c); }
int socketpair(int a, int b, int c, int d[2]) { REAL(socketpair); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(a, b, c, d); }
int pipe(int fds[2]) { REAL(pipe); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(fds); }
int pipe2(int fds[2], int flags) { REAL(pipe2); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(fds, flags); }
int accept(int fd, struct sockaddr *a, socklen_t *l) { REAL(accept); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(fd, a, l); }
int accept4(int fd, struct sockaddr *a, socklen_t *l, int f) { REAL(accept4); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(fd, a, l, f); }
int epoll_create1(int flags) { REAL(epoll_create1); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(flags); }
int eventfd(unsigned int value, int flags) { REAL(eventfd); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(value, flags); }
int dup(int fd) { REAL(dup); if (fails(DESCRIPTOR)) FAIL(EMFILE, -1); return real(fd); }

/* --- processes and threads: EAGAIN */
pid_t fork(void) { REAL(fork); if (fails(PROCESS)) FAIL(EAGAIN, -1); return real(); }
pid_t vfork(void) { return fork(); } /* a wrapper may not return in the child of a real one */
int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *a, const posix_spawnattr_t *b, char *const c[], char *const d[]) {
  REAL(posix_spawn);
  return fails(PROCESS) ? EAGAIN : real(pid, path, a, b, c, d);
}
int pthread_create(pthread_t *thread, const pthread_attr_t *a, void *(*run)(void *), void *argument) {
  REAL(pthread_create);
  return fails(PROCESS) ? EAGAIN : real(thread, a, run, argument);
}

/* --- a full disk: ENOSPC, for files only; --- a lost peer: ECONNRESET, for sockets */
static int refused(int fd) {
  struct stat found;
  int saved = errno, number = 0;
  if (control && ready && (control->kind == WRITE || control->kind == SEND) && fstat(fd, &found) == 0) {
    if (S_ISREG(found.st_mode) && fails(WRITE)) number = ENOSPC;
    if (S_ISSOCK(found.st_mode) && fails(SEND)) number = ECONNRESET;
  }
  errno = saved;
  return number;
}
#define WRITING(name, signature, call) \
  ssize_t name signature { REAL(name); int number = refused(fd); if (number) FAIL(number, -1); return real call; }
WRITING(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITING(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITING(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITING(writev, (int fd, const struct iovec *data, int count), (fd, data, count))
WRITING(send, (int fd, const void *data, size_t size, int flags), (fd, data, size, flags))
WRITING(sendto, (int fd, const void *data, size_t size, int flags, const struct sockaddr *to, socklen_t length), (fd, data, size, flags, to, length))
WRITING(sendmsg, (int fd, const struct msghdr *message, int flags), (fd, message, flags))
int fsync(int fd) { REAL(fsync); if (fails(WRITE)) FAIL(ENOSPC, -1); return real(fd); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); if (fails(WRITE)) FAIL(ENOSPC, -1); return real(path, mode); }
int rename(const char *from, const char *to) { REAL(rename); if (fails(WRITE)) FAIL(ENOSPC, -1); return real(from, to); }

/* --- memory: ENOMEM, for what is large */
void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
  if (fails(MAP)) FAIL(ENOMEM, MAP_FAILED);
  return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) { return mmap(at, size, protection, flags, fd, offset); }
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
void *malloc(size_t size) { if (size >= LARGE_BYTES && fails(ALLOCATION)) FAIL(ENOMEM, NULL); return __libc_malloc(size); }
void *calloc(size_t count, size_t size) { if (count * size >= LARGE_BYTES && fails(ALLOCATION)) FAIL(ENOMEM, NULL); return __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { if (size >= LARGE_BYTES && fails(ALLOCATION)) FAIL(ENOMEM, NULL); return __libc_realloc(old, size); }
void *aligned_alloc(size_t alignment, size_t size) { if (size >= LARGE_BYTES && fails(ALLOCATION)) FAIL(ENOMEM, NULL); return __libc_memalign(alignment, size); }
int posix_memalign(void **result, size_t alignment, size_t size) {
  if (size >= LARGE_BYTES && fails(ALLOCATION)) return ENOMEM;
  *result = __libc_memalign(alignment, size);
  return *result ? 0 : ENOMEM;
}
