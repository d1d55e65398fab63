/* The workloads: processes that start and exit as fast as this machine can.
 *
 *     load fork COUNT FAILING_EVERY NAME       vfork and _exit, one after the other, reaped at once
 *     load exec COUNT FAILING_EVERY NAME       the same with an exec of this very program in between
 *     load pace COUNT PAUSE_US NAME            like fork, every one failing with 3, with a pause after each
 *     load rate COUNT PER_SECOND NAME          like fork, at a steady rate
 *     load burst COUNT FAILING_EVERY NAME      COUNT processes that wait; released at once by a line on standard input
 *
 * The processes inherit the name NAME, so that no COMM event disturbs the count. Every FAILING_EVERY-th exits with 1, but
 * not the first; with 0, none does. All are made by vfork(), except those of a burst, which must live side by side. Print
 * one JSON line: wall time, CPU time of this process and its children (where the kernel sends the events), and the number of
 * failures by waitpid(). A burst first prints the PIDs, and prints the time of its release.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void sleep_until(long long at_ns)
{
    struct timespec at = { at_ns / 1000000000, at_ns % 1000000000 };
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
}

static double cpu_s(int who)
{
    struct rusage used;
    getrusage(who, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static pid_t start(const char *program, int execs, int code)
{
    char text[] = { '0' + code, 0 };
    char *const arguments[] = { "load", "exit", text, NULL };
    pid_t pid = vfork();
    if (pid == 0) {
        if (execs)
            execve(program, arguments, (char *[]){ NULL });
        _exit(code);
    }
    return pid;
}

int main(int count_of, char **arguments)
{
    if (count_of == 3) /* started by exec of this program */
        _exit(arguments[2][0] - '0');
    if (count_of < 5)
        return 2;
    const char *mode = arguments[1];
    long count = atol(arguments[2]), every = atol(arguments[3]), failed = 0, started = 0;
    int status, gate[2], burst = !strcmp(mode, "burst"), pace = !strcmp(mode, "pace"), execs = !strcmp(mode, "exec");
    int rate = !strcmp(mode, "rate");

    prctl(PR_SET_NAME, arguments[4], 0, 0, 0);
    if (burst && pipe(gate) == 0) {
        for (; started < count; started++) {
            pid_t pid = fork();
            if (pid == 0) {
                char byte;
                prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
                close(gate[1]);
                while (read(gate[0], &byte, 1) > 0)
                    ;
                _exit(every && started % every == every - 1);
            }
            if (pid < 0)
                break;
            printf("%d ", pid);
        }
        puts("0");
        fflush(stdout);
        if (getchar() == EOF)
            return 1;
        close(gate[0]);
    }
    long long began = now_ns();
    if (burst) {
        close(gate[1]);
        for (long i = 0; i < started; i++)
            failed += wait(&status) > 0 && status != 0;
    } else {
        for (; started < count; started++) {
            int code = pace ? 3 : !rate && every && started % every == every - 1;
            if (rate)
                sleep_until(began + started * (1000000000LL / every));
            pid_t pid = start(arguments[0], execs, code);
            if (pid < 0 || waitpid(pid, &status, 0) != pid)
                return 1;
            failed += status != 0;
            if (pace)
                usleep(every);
        }
    }
    printf("{\"began_ns\": %lld, \"wall_s\": %.6f, \"cpu_s\": %.6f, \"processes\": %ld, \"failed\": %ld}\n", began,
           (now_ns() - began) / 1e9, cpu_s(RUSAGE_SELF) + cpu_s(RUSAGE_CHILDREN), started, failed);
    return 0;
}
