/* Hurts a process at its n-th call that changes files under one folder. Loaded by LD_PRELOAD; tests/injector.py speaks to it.

   A call counts when it can change what is under the folder: file contents, names, times, and the syncs that make them last.
   Actions: a positive errno fails the call; KILL ends the process before it; TORN lets half of a write happen and then ends
   the process (other calls do not count); DATA_LOST and NAMES_LOST end the process as a power cut can: the content of files
   that were not synced is gone, or what happened to names in folders that were not synced has not happened. An errno may
   come at all later calls as well; ENOSPC then lets those pass that free space. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING = 0, KILL = -1, TORN = -2, DATA_LOST = -3, NAMES_LOST = -4 };
enum { MOST_CALLS = 4096, MOST_UNSYNCED = 256, DUPLICATES_FROM = 512 };

static char folder[PATH_MAX];
static long strike_at;
static int action;
static bool repeat;
static atomic_long count;
static char calls[MOST_CALLS][160];

static struct {
    int descriptor;
    dev_t device;
    ino_t inode;
} unsynced[MOST_UNSYNCED];
static int unsynced_count;

/* A name that appeared (from nowhere, or renamed) or went away, and the old file of that name if there was one. */
static struct {
    dev_t device;
    ino_t inode; /* of the folder whose sync makes it last */
    bool appeared;
    char path[PATH_MAX], from[PATH_MAX], kept[PATH_MAX];
} names[MOST_UNSYNCED];
static int name_count, kept_count;
static pthread_mutex_t unsynced_lock = PTHREAD_MUTEX_INITIALIZER;

/* The next definition of a function of the same name, libc's. */
#define REAL(name)                                                                                                     \
    static __typeof__(&name) real;                                                                                     \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void inject(long n, int what, int again_and_again, const char *under) {
    snprintf(folder, sizeof folder, "%s", under);
    strike_at = n;
    repeat = again_and_again;
    unsynced_count = name_count = 0;
    atomic_store(&count, 0);
    action = what;
}

/* Ends it; what was counted can still be asked for. */
void disarm(void) { action = NOTHING; }

long counted(void) { return atomic_load(&count); }

/* What the n-th counted call was and to which file, for people. */
const char *call(long n) { return n >= 1 && n <= MOST_CALLS ? calls[n - 1] : ""; }

static bool is_inside(const char *path) {
    size_t length = strlen(folder);
    return length && strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

static void path_of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
}

static void path_at(int directory, const char *name, char *path) {
    char start[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (directory != AT_FDCWD)
        path_of_descriptor(directory, start);
    else if (!getcwd(start, sizeof start))
        start[0] = '\0';
    size_t length = strlen(start);
    snprintf(path, PATH_MAX, "%s", start);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Ends the process in the worst state that a file system may leave. */
void cut_power(void) {
    pthread_mutex_lock(&unsynced_lock);
    action = NOTHING;
    for (int i = 0; i < unsynced_count; i++)
        if (ftruncate(unsynced[i].descriptor, 0)) abort();
    for (int i = name_count - 1; i >= 0; i--) {
        char gone[PATH_MAX + 8];
        snprintf(gone, sizeof gone, "%s.gone", names[i].kept);
        if (names[i].appeared && rename(names[i].path, names[i].from[0] ? names[i].from : gone)) abort();
        if (access(names[i].kept, F_OK) == 0 && rename(names[i].kept, names[i].path)) abort();
    }
    die();
}

/* Counts a call and does what was asked for, if this is the one. Returns whether it must fail now (errno is set) or, for a
   write that is to be torn, must go half way and die. */
static bool strikes(const char *name, const char *path, bool is_write) {
    if (action == NOTHING || !is_inside(path) || (action == TORN && !is_write)) return false;
    long n = atomic_fetch_add(&count, 1) + 1;
    if (n <= MOST_CALLS) {
        const char *last = strrchr(path, '/');
        snprintf(calls[n - 1], sizeof calls[0], "%s %.100s", name, last ? last + 1 : path);
    }
    if (n < strike_at || (n > strike_at && !repeat)) return false;
    if (n > strike_at && action == ENOSPC && (strncmp(name, "unlink", 6) == 0 || strcmp(name, "rmdir") == 0)) return false;
    if (action == KILL) die();
    if (action == DATA_LOST || action == NAMES_LOST) cut_power();
    if (action > 0) errno = action;
    return true;
}

static bool strikes_at(const char *name, int directory, const char *path) {
    if (action == NOTHING) return false;
    int before = errno;
    char whole[PATH_MAX];
    path_at(directory, path, whole);
    bool struck = strikes(name, whole, false);
    if (!struck) errno = before;
    return struck;
}

static bool strikes_either(const char *name, int a, const char *from, int b, const char *to) {
    char whole[PATH_MAX];
    path_at(a, from, whole);
    return is_inside(whole) ? strikes_at(name, a, from) : strikes_at(name, b, to);
}

static bool strikes_descriptor(const char *name, int descriptor, bool is_write) {
    if (action == NOTHING || descriptor <= STDERR_FILENO) return false;
    int before = errno;
    char path[PATH_MAX];
    path_of_descriptor(descriptor, path);
    bool struck = strikes(name, path, is_write);
    if (!struck) errno = before;
    return struck;
}

static void is_unsynced(int descriptor) {
    struct stat facts;
    char path[PATH_MAX];
    if (action != DATA_LOST || descriptor <= STDERR_FILENO) return;
    path_of_descriptor(descriptor, path);
    if (!is_inside(path) || fstat(descriptor, &facts) || !S_ISREG(facts.st_mode)) return;
    pthread_mutex_lock(&unsynced_lock);
    bool known = false;
    for (int i = 0; i < unsynced_count; i++)
        known |= unsynced[i].device == facts.st_dev && unsynced[i].inode == facts.st_ino;
    if (!known) {
        if (unsynced_count == MOST_UNSYNCED) abort();
        int duplicate = fcntl(descriptor, F_DUPFD_CLOEXEC, DUPLICATES_FROM);
        if (duplicate < 0) abort();
        unsynced[unsynced_count].descriptor = duplicate;
        unsynced[unsynced_count].device = facts.st_dev;
        unsynced[unsynced_count++].inode = facts.st_ino;
    }
    pthread_mutex_unlock(&unsynced_lock);
}

static void is_synced(int descriptor) {
    struct stat facts;
    if ((action != DATA_LOST && action != NAMES_LOST) || fstat(descriptor, &facts)) return;
    pthread_mutex_lock(&unsynced_lock);
    for (int i = 0; i < unsynced_count; i++)
        if (unsynced[i].device == facts.st_dev && unsynced[i].inode == facts.st_ino) {
            close(unsynced[i].descriptor);
            unsynced[i--] = unsynced[--unsynced_count];
        }
    int left = 0;
    for (int i = 0; i < name_count; i++)
        if (names[i].device != facts.st_dev || names[i].inode != facts.st_ino) {
            if (left < i) names[left] = names[i];
            left++;
        }
    name_count = left;
    pthread_mutex_unlock(&unsynced_lock);
}

/* Notes a change of a name that is about to be tried, and keeps the file that has the name now. A change that then fails is
   forgotten by unchanged(). Names made by link and symlink or removed by rmdir last at once. */
static void changes(const char *path, const char *from, bool appears) {
    struct stat facts;
    char whole[PATH_MAX], parent[PATH_MAX];
    if (action != NAMES_LOST) return;
    path_at(AT_FDCWD, path, whole);
    snprintf(parent, sizeof parent, "%s", whole);
    *strrchr(parent, '/') = '\0';
    if (!is_inside(whole) || stat(parent, &facts)) return;
    pthread_mutex_lock(&unsynced_lock);
    if (name_count == MOST_UNSYNCED) abort();
    names[name_count].device = facts.st_dev;
    names[name_count].inode = facts.st_ino;
    names[name_count].appeared = appears;
    strcpy(names[name_count].path, whole);
    names[name_count].from[0] = '\0';
    if (from) path_at(AT_FDCWD, from, names[name_count].from);
    if (snprintf(names[name_count].kept, PATH_MAX, "%s.lost/%d-%d", folder, getpid(), kept_count++) >= PATH_MAX) abort();
    if (link(whole, names[name_count].kept) && errno != ENOENT) abort();
    name_count++;
    pthread_mutex_unlock(&unsynced_lock);
}

static void unchanged(const char *path) {
    char whole[PATH_MAX];
    path_at(AT_FDCWD, path, whole);
    if (action == NAMES_LOST && name_count && strcmp(names[name_count - 1].path, whole) == 0) name_count--;
}

/* Writes. */

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    if (strikes_descriptor("write", descriptor, true)) {
        if (action > 0) return -1;
        real(descriptor, bytes, size / 2);
        die();
    }
    is_unsynced(descriptor);
    return real(descriptor, bytes, size);
}

#define PWRITE(name)                                                                                                   \
    ssize_t name(int descriptor, const void *bytes, size_t size, off_t offset) {                                       \
        REAL(name);                                                                                                    \
        if (strikes_descriptor(#name, descriptor, true)) {                                                             \
            if (action > 0) return -1;                                                                                 \
            real(descriptor, bytes, size / 2, offset);                                                                 \
            die();                                                                                                     \
        }                                                                                                              \
        is_unsynced(descriptor);                                                                                       \
        return real(descriptor, bytes, size, offset);                                                                  \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    REAL(writev);
    if (strikes_descriptor("writev", descriptor, true)) {
        if (action > 0) return -1;
        struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
        real(descriptor, number > 1 ? parts : &half, number > 1 ? number / 2 : 1);
        die();
    }
    is_unsynced(descriptor);
    return real(descriptor, parts, number);
}

#define SENDFILE(name)                                                                                                 \
    ssize_t name(int to, int from, off_t *offset, size_t size) {                                                       \
        REAL(name);                                                                                                    \
        if (strikes_descriptor(#name, to, true)) {                                                                     \
            if (action > 0) return -1;                                                                                 \
            struct stat facts;                                                                                         \
            size_t whole = fstat(from, &facts) ? 0 : (size_t)facts.st_size;                                            \
            real(to, from, offset, (size < whole ? size : whole) / 2);                                                 \
            die();                                                                                                     \
        }                                                                                                              \
        is_unsynced(to);                                                                                               \
        return real(to, from, offset, size);                                                                           \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t size, unsigned flags) {
    REAL(copy_file_range);
    if (strikes_descriptor("copy_file_range", to, true)) {
        if (action > 0) return -1;
        real(from, from_offset, to, to_offset, size / 2, flags);
        die();
    }
    is_unsynced(to);
    return real(from, from_offset, to, to_offset, size, flags);
}

/* Opening: only with what may create, empty or write. */

static bool may_write(int flags) { return flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR); }

#define MODE(last)                                                                                                     \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, last);                                                                                          \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        REAL(name);                                                                                                    \
        MODE(flags)                                                                                                    \
        if (may_write(flags) && strikes_at(#name, AT_FDCWD, path)) return -1;                                          \
        bool is_new = action == NAMES_LOST && flags & O_CREAT && access(path, F_OK);                                   \
        if (is_new) changes(path, NULL, true);                                                                         \
        int descriptor = real(path, flags, mode);                                                                      \
        if (is_new && descriptor < 0) unchanged(path);                                                                 \
        if (descriptor >= 0 && flags & (O_CREAT | O_TRUNC)) is_unsynced(descriptor);                                   \
        return descriptor;                                                                                             \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        REAL(name);                                                                                                    \
        MODE(flags)                                                                                                    \
        if (may_write(flags) && strikes_at(#name, directory, path)) return -1;                                         \
        int descriptor = real(directory, path, flags, mode);                                                           \
        if (descriptor >= 0 && flags & (O_CREAT | O_TRUNC)) is_unsynced(descriptor);                                   \
        return descriptor;                                                                                             \
    }
OPENAT(openat)
OPENAT(openat64)

/* C++ streams open by fopen and write by write. */
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        REAL(name);                                                                                                    \
        if (strpbrk(mode, "wa+") && strikes_at(#name, AT_FDCWD, path)) return NULL;                                    \
        FILE *file = real(path, mode);                                                                                 \
        if (file && strpbrk(mode, "w")) is_unsynced(fileno(file));                                                     \
        return file;                                                                                                   \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* Names. */

int rename(const char *from, const char *to) {
    REAL(rename);
    if (strikes_either("rename", AT_FDCWD, from, AT_FDCWD, to)) return -1;
    changes(to, from, true);
    int result = real(from, to);
    if (result) unchanged(to);
    return result;
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return strikes_either("renameat", a, from, b, to) ? -1 : real(a, from, b, to);
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    return strikes_either("renameat2", a, from, b, to) ? -1 : real(a, from, b, to, flags);
}

int link(const char *from, const char *to) {
    REAL(link);
    return strikes_at("link", AT_FDCWD, to) ? -1 : real(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat);
    return strikes_at("linkat", b, to) ? -1 : real(a, from, b, to, flags);
}

int symlink(const char *content, const char *path) {
    REAL(symlink);
    return strikes_at("symlink", AT_FDCWD, path) ? -1 : real(content, path);
}

int symlinkat(const char *content, int directory, const char *path) {
    REAL(symlinkat);
    return strikes_at("symlinkat", directory, path) ? -1 : real(content, directory, path);
}

int unlink(const char *path) {
    REAL(unlink);
    if (strikes_at("unlink", AT_FDCWD, path)) return -1;
    changes(path, NULL, false);
    int result = real(path);
    if (result) unchanged(path);
    return result;
}

int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    return strikes_at("unlinkat", directory, path) ? -1 : real(directory, path, flags);
}

int rmdir(const char *path) {
    REAL(rmdir);
    return strikes_at("rmdir", AT_FDCWD, path) ? -1 : real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (strikes_at("mkdir", AT_FDCWD, path)) return -1;
    bool is_new = action == NAMES_LOST && access(path, F_OK);
    if (is_new) changes(path, NULL, true);
    int result = real(path, mode);
    if (is_new && result) unchanged(path);
    return result;
}

int mkdirat(int directory, const char *path, mode_t mode) {
    REAL(mkdirat);
    return strikes_at("mkdirat", directory, path) ? -1 : real(directory, path, mode);
}

/* Sizes, times, syncs. */

#define TRUNCATE(name)                                                                                                 \
    int name(const char *path, off_t size) {                                                                           \
        REAL(name);                                                                                                    \
        return strikes_at(#name, AT_FDCWD, path) ? -1 : real(path, size);                                              \
    }
TRUNCATE(truncate)
TRUNCATE(truncate64)

#define FTRUNCATE(name)                                                                                                \
    int name(int descriptor, off_t size) {                                                                             \
        REAL(name);                                                                                                    \
        if (strikes_descriptor(#name, descriptor, false)) return -1;                                                   \
        is_unsynced(descriptor);                                                                                       \
        return real(descriptor, size);                                                                                 \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

int utimensat(int directory, const char *path, const struct timespec times[2], int flags) {
    REAL(utimensat);
    return strikes_at("utimensat", directory, path) ? -1 : real(directory, path, times, flags);
}

int futimens(int descriptor, const struct timespec times[2]) {
    REAL(futimens);
    return strikes_descriptor("futimens", descriptor, false) ? -1 : real(descriptor, times);
}

#define SYNC(name)                                                                                                     \
    int name(int descriptor) {                                                                                         \
        REAL(name);                                                                                                    \
        if (strikes_descriptor(#name, descriptor, false)) return -1;                                                   \
        int result = real(descriptor);                                                                                 \
        if (result == 0) is_synced(descriptor);                                                                        \
        return result;                                                                                                 \
    }
SYNC(fsync)
SYNC(fdatasync)
