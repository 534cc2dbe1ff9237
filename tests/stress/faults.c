/* Kills or fails a process at its n-th file-system call below a folder. To be preloaded (LD_PRELOAD), then armed.
 *
 * Counted are calls that change something, and only those whose path or file lies below the folder, so that terminals,
 * caches and temporary files elsewhere do not count. Without faults_arm every call goes through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, COUNT, KILL, KILL_HALFWAY, FAIL };
enum kind { MAKES, REMOVES, SYNCS, CLOSES };
enum { LOG = 65536 };

static char folder[PATH_MAX];
static atomic_int mode;
static long first, last;
static int error_number;
static atomic_long calls;
static const char *names[LOG];

/* From call `from` to call `to` (counted from 1) `what` happens; `number` is the errno for FAIL. */
void faults_arm(const char *below, int what, long from, long to, int number) {
  mode = OFF;
  snprintf(folder, sizeof folder, "%s", below);
  first = from, last = to, error_number = number, calls = 0;
  mode = what;
}
long faults_calls(void) { return calls; }
const char *faults_name(long n) { return n > 0 && n < LOG ? names[n] : NULL; }

static int below_folder(const char *path) {
  size_t n = strlen(folder);
  return strncmp(path, folder, n) == 0 && (path[n] == 0 || path[n] == '/');
}

static int fd_counts(int fd) {
  char link[64], path[PATH_MAX];
  int saved = errno;
  if (mode == OFF) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (n < 0) return 0;
  path[n] = 0;
  return below_folder(path);
}

static int path_counts(int fd, const char *path) {
  if (mode == OFF) return 0;
  if (path[0] == '/') return below_folder(path);
  char here[PATH_MAX];
  if (fd != AT_FDCWD) return fd_counts(fd);
  return getcwd(here, sizeof here) && below_folder(here);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* The call's fate: 0 goes through, 1 writes half and dies, -1 fails with errno set. */
static int fate(const char *name, enum kind kind) {
  long n = ++calls;
  if (n < LOG) names[n] = name;
  if (mode == COUNT || n < first || n > last) return 0;
  if (mode == KILL) die();
  if (mode == KILL_HALFWAY) {
    if (strstr(name, "write") || !strcmp(name, "sendfile") || !strcmp(name, "copy_file_range")) return 1;
    die();
  }
  /* A full disk lets files be removed; a read-only one lets them be closed. */
  if ((error_number == ENOSPC && kind == REMOVES) || (error_number == EROFS && kind == CLOSES)) return 0;
  errno = error_number;
  return -1;
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* type name(parameters), where a counted call goes through real(arguments) or fails. */
#define WRAP(type, name, kind, counts, parameters, arguments) \
  type name parameters { \
    REAL(name); \
    if ((counts) && fate(#name, kind)) return -1; \
    return real arguments; \
  }

/* The same for calls that write `size` bytes, of which the first half can be written. */
#define WRAP_WRITE(name, fd, parameters, arguments, half) \
  ssize_t name parameters { \
    REAL(name); \
    int what = fd_counts(fd) ? fate(#name, MAKES) : 0; \
    if (what < 0) return -1; \
    if (what > 0) { \
      (void)!real half; \
      die(); \
    } \
    return real arguments; \
  }

WRAP_WRITE(write, fd, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
WRAP_WRITE(pwrite, fd, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at))
WRAP_WRITE(pwrite64, fd, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at),
           (fd, data, size / 2, at))
WRAP_WRITE(writev, fd, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2))
WRAP_WRITE(pwritev, fd, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), (fd, v, n / 2, at))
WRAP_WRITE(pwritev64, fd, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), (fd, v, n / 2, at))
WRAP_WRITE(sendfile, to, (int to, int from, off_t *at, size_t size), (to, from, at, size), (to, from, at, size / 2))
WRAP_WRITE(sendfile64, to, (int to, int from, off64_t *at, size_t size), (to, from, at, size), (to, from, at, size / 2))
WRAP_WRITE(copy_file_range, to, (int from, off64_t *f, int to, off64_t *t, size_t size, unsigned flags),
           (from, f, to, t, size, flags), (from, f, to, t, size / 2, flags))

WRAP(int, rename, MAKES, path_counts(AT_FDCWD, a) || path_counts(AT_FDCWD, b), (const char *a, const char *b), (a, b))
WRAP(int, renameat, MAKES, path_counts(d, a) || path_counts(e, b), (int d, const char *a, int e, const char *b),
     (d, a, e, b))
WRAP(int, renameat2, MAKES, path_counts(d, a) || path_counts(e, b),
     (int d, const char *a, int e, const char *b, unsigned flags), (d, a, e, b, flags))
WRAP(int, link, MAKES, path_counts(AT_FDCWD, b), (const char *a, const char *b), (a, b))
WRAP(int, linkat, MAKES, path_counts(e, b), (int d, const char *a, int e, const char *b, int flags), (d, a, e, b, flags))
WRAP(int, symlink, MAKES, path_counts(AT_FDCWD, b), (const char *a, const char *b), (a, b))
WRAP(int, mkdir, MAKES, path_counts(AT_FDCWD, path), (const char *path, mode_t bits), (path, bits))
WRAP(int, mkdirat, MAKES, path_counts(fd, path), (int fd, const char *path, mode_t bits), (fd, path, bits))
WRAP(int, unlink, REMOVES, path_counts(AT_FDCWD, path), (const char *path), (path))
WRAP(int, unlinkat, REMOVES, path_counts(fd, path), (int fd, const char *path, int flags), (fd, path, flags))
WRAP(int, rmdir, REMOVES, path_counts(AT_FDCWD, path), (const char *path), (path))
WRAP(int, truncate, MAKES, path_counts(AT_FDCWD, path), (const char *path, off_t size), (path, size))
WRAP(int, ftruncate, MAKES, fd_counts(fd), (int fd, off_t size), (fd, size))
WRAP(int, ftruncate64, MAKES, fd_counts(fd), (int fd, off64_t size), (fd, size))
WRAP(int, fsync, SYNCS, fd_counts(fd), (int fd), (fd))
WRAP(int, fdatasync, SYNCS, fd_counts(fd), (int fd), (fd))

int close(int fd) { /* counted for files open for writing; a close that fails has closed the file all the same */
  REAL(close);
  int writes = mode != OFF && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY && fd_counts(fd);
  if (!writes || !fate("close", CLOSES)) return real(fd);
  int number = errno;
  real(fd);
  errno = number;
  return -1;
}

#define CHANGES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define BITS(flags, bits) \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    bits = va_arg(rest, mode_t); \
    va_end(rest); \
  }
#define WRAP_OPEN(name, fd, parameters, arguments) \
  int name parameters { \
    REAL(name); \
    mode_t bits = 0; \
    BITS(flags, bits) \
    if (CHANGES(flags) && path_counts(fd, path) && fate(#name, MAKES)) return -1; \
    return real arguments; \
  }
WRAP_OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, bits))
WRAP_OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, bits))
WRAP_OPEN(openat, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, bits))
WRAP_OPEN(openat64, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, bits))
