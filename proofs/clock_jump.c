// Moves the wall clock of one process while it runs, and leaves the monotonic clock alone.
//
//   cc -shared -fPIC -o clock_jump.so clock_jump.c
//   CLOCK_JUMP_FOLDER=/tmp/clocks LD_PRELOAD=./clock_jump.so program
//
// Each process creates a file named after its id in that folder. Writing eight bytes, a number of seconds, to the file
// moves the clock of the process by that much.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t none;
static volatile int64_t *seconds = &none;

__attribute__((constructor)) static void start(void) {
  const char *folder = getenv("CLOCK_JUMP_FOLDER");
  char path[4096];
  if (folder == NULL) return;
  snprintf(path, sizeof path, "%s/%d", folder, getpid());
  int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0 || ftruncate(file, sizeof none)) abort();
  void *map = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
  if (map == MAP_FAILED) abort();
  seconds = map;
  close(file);
}

// The function of libc that `name` replaces.
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int clock_gettime(clockid_t clock, struct timespec *now) {
  static __typeof__(&clock_gettime) real;
  if (real == NULL) real = REAL(clock_gettime);
  int error = real(clock, now);
  if (!error && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *seconds;
  return error;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec t;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &t);
  now->tv_sec = t.tv_sec;
  now->tv_usec = t.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (out != NULL) *out = t.tv_sec;
  return t.tv_sec;
}

// The kernel does not know the moved clock, so a deadline on it is moved back.
static struct timespec known(const struct timespec *deadline) {
  struct timespec t = *deadline;
  t.tv_sec -= *seconds;
  return t;
}

int sem_timedwait(sem_t *s, const struct timespec *deadline) {
  struct timespec t = known(deadline);
  return REAL(sem_timedwait)(s, &t);
}

int sem_clockwait(sem_t *s, clockid_t clock, const struct timespec *deadline) {
  struct timespec t = clock == CLOCK_REALTIME ? known(deadline) : *deadline;
  return REAL(sem_clockwait)(s, clock, &t);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *request, struct timespec *rest) {
  struct timespec t = clock == CLOCK_REALTIME && flags & TIMER_ABSTIME ? known(request) : *request;
  return REAL(clock_nanosleep)(clock, flags, &t, rest);
}

// A condition does not tell its clock. Deadlines on the monotonic clock, which counts from the start of the machine,
// are smaller.
int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *deadline) {
  struct timespec t = deadline->tv_sec > 1000000000 ? known(deadline) : *deadline;
  return REAL(pthread_cond_timedwait)(c, m, &t);
}

// JAX waits for futexes without a function of libc.
long syscall(long number, ...) {
  long a[6];
  struct timespec t;
  va_list arguments;
  va_start(arguments, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
  va_end(arguments);
  if (number == SYS_futex && a[1] & FUTEX_CLOCK_REALTIME && a[3]) {
    t = known((const struct timespec *)a[3]);
    a[3] = (long)&t;
  }
  return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
