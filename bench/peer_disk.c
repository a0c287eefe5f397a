/* Preloaded into a peer's process: counts the calls that change the disk under a folder, and acts at one of them.
 *
 * torch.save writes from C++ and safetensors from Rust, so that hooks in Python would see neither. A boundary is such
 * a call: a write (of which half is done before a kill), an open that makes or empties a file, a rename, a removal, a
 * new folder, a sync. Writes through a mapping are not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL };
static char folder[PATH_MAX];
static size_t folder_length;
static int mode;
static long at, count, syncs;

void peer_disk_arm(const char *where, int what, long boundary) {
    snprintf(folder, sizeof folder, "%s", where);
    folder_length = strlen(folder);
    mode = what, at = boundary, count = syncs = 0;
}
long peer_disk_count(void) { return count; }
long peer_disk_syncs(void) { return syncs; }

static int under(const char *path) {
    /* A relative path is rmtree's, which goes by a folder's descriptor. */
    return folder_length && path && (path[0] != '/' || !strncmp(path, folder, folder_length));
}
static int holds(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!folder_length || descriptor < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path[0] == '/' && !strncmp(path, folder, folder_length);
}
static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}
/* 1: this call is the one that kills; 2: it finds the disk full (from the chosen one on). */
static int reached(void) {
    long here = count++;
    if (mode == KILL && here == at) return 1;
    return mode == FULL && here >= at ? 2 : 0;
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define NO_ROOM do { errno = ENOSPC; return -1; } while (0)

ssize_t write(int d, const void *data, size_t n) {
    REAL(write);
    int what = holds(d) ? reached() : 0;
    if (what == 1) { if (real(d, data, n / 2) >= 0) die(); die(); }
    if (what == 2) NO_ROOM;
    return real(d, data, n);
}
#define POSITIONED(name, offset_type)                                       \
    ssize_t name(int d, const void *data, size_t n, offset_type place) {    \
        REAL(name);                                                         \
        int what = holds(d) ? reached() : 0;                                \
        if (what == 1) { if (real(d, data, n / 2, place) >= 0) die(); die(); } \
        if (what == 2) NO_ROOM;                                             \
        return real(d, data, n, place);                                     \
    }
POSITIONED(pwrite, off_t)
POSITIONED(pwrite64, off64_t)
ssize_t writev(int d, const struct iovec *parts, int n) {
    REAL(writev);
    int what = holds(d) ? reached() : 0;
    if (what == 1) { if (real(d, parts, n > 1 ? n / 2 : 1) >= 0) die(); die(); }
    if (what == 2) NO_ROOM;
    return real(d, parts, n);
}
#define SENDING(name, offset_type)                                 \
    ssize_t name(int to, int from, offset_type *place, size_t n) { \
        REAL(name);                                                \
        int what = holds(to) ? reached() : 0;                      \
        if (what == 1) die();                                      \
        if (what == 2) NO_ROOM;                                    \
        return real(to, from, place, n);                           \
    }
SENDING(sendfile, off_t)
SENDING(sendfile64, off64_t)
#define OPENING(name)                                                            \
    int name(const char *path, int flags, ...) {                                 \
        REAL(name);                                                              \
        va_list more; va_start(more, flags);                                     \
        mode_t given = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                            \
        int what = flags & (O_CREAT | O_TRUNC) && under(path) ? reached() : 0;   \
        if (what == 1) die();                                                    \
        return real(path, flags, given); /* a full disk still makes and empties files */ \
    }
OPENING(open)
OPENING(open64)
#define OPENING_AT(name)                                                         \
    int name(int base, const char *path, int flags, ...) {                       \
        REAL(name);                                                              \
        va_list more; va_start(more, flags);                                     \
        mode_t given = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                            \
        if (flags & (O_CREAT | O_TRUNC) && under(path) && reached() == 1) die(); \
        return real(base, path, flags, given);                                   \
    }
OPENING_AT(openat)
OPENING_AT(openat64)
#define COUNTED(name, where, types, names)         \
    int name types {                               \
        REAL(name);                                \
        if (under(where) && reached() == 1) die(); \
        return real names;                         \
    }
COUNTED(rename, to, (const char *from, const char *to), (from, to))
COUNTED(renameat, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
COUNTED(unlink, path, (const char *path), (path))
COUNTED(unlinkat, path, (int a, const char *path, int flags), (a, path, flags))
COUNTED(rmdir, path, (const char *path), (path))
COUNTED(mkdir, path, (const char *path, mode_t given), (path, given))
COUNTED(symlink, path, (const char *to, const char *path), (to, path))
#define SYNC(name)                      \
    int name(int d) {                   \
        REAL(name);                     \
        if (holds(d)) {                 \
            syncs++;                    \
            if (reached() == 1) die();  \
        }                               \
        return real(d);                 \
    }
SYNC(fsync)
SYNC(fdatasync)
