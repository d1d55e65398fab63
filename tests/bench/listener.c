/* The usual listener: epoll, one recv() per event, a counter per event type. cnprocd is compared with it.
 *
 * Subscribe to the proc connector with the 4-byte LISTEN, which every kernel accepts, and a receive buffer of 8 MB. With
 * the argument "failures" narrow it to failed exits (struct proc_input, Linux 6.6 and newer), and measure the time from
 * each event's timestamp to its recv(): a bare wake-up. Print "ready" when subscribed; on SIGTERM print the counts, the
 * time of the last event and the times in microseconds, as one JSON line.
 */
#include <linux/cn_proc.h>
#include <linux/connector.h>
#include <linux/netlink.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST_TIMES 100000
#define NONZERO_EXIT 0x20000000u /* PROC_EVENT_NONZERO_EXIT, which older headers lack */

static unsigned times_us[MOST_TIMES];
static volatile sig_atomic_t stop;
static void on_term(int number) { (void)number; stop = 1; }

static int by_size(const void *one, const void *other)
{
    unsigned a = *(const unsigned *)one, b = *(const unsigned *)other;
    return (a > b) - (a < b);
}

static unsigned quantile(unsigned count, double share)
{
    unsigned place = share * count;
    return count ? times_us[place < count ? place : count - 1] : 0;
}

static int narrow(int fd)
{
    struct __attribute__((aligned(NLMSG_ALIGNTO))) {
        struct nlmsghdr head;
        struct __attribute__((packed)) { struct cn_msg message; unsigned op, mask; } body;
    } ask = { .head = { .nlmsg_len = sizeof ask, .nlmsg_type = NLMSG_DONE, .nlmsg_pid = getpid() },
              .body = { .message = { .id = { CN_IDX_PROC, CN_VAL_PROC }, .len = 2 * sizeof(unsigned) },
                        .op = PROC_CN_MCAST_LISTEN, .mask = NONZERO_EXIT } };
    return send(fd, &ask, sizeof ask, 0) < 0;
}

int main(int count, char **arguments)
{
    int failures = count > 1 && !strcmp(arguments[1], "failures");
    unsigned times = 0;
    struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = CN_IDX_PROC };
    struct __attribute__((aligned(NLMSG_ALIGNTO))) {
        struct nlmsghdr head;
        struct __attribute__((packed)) { struct cn_msg message; enum proc_cn_mcast_op op; } body;
    } ask = { .head = { .nlmsg_len = sizeof ask, .nlmsg_type = NLMSG_DONE, .nlmsg_pid = getpid() },
              .body = { .message = { .id = { CN_IDX_PROC, CN_VAL_PROC }, .len = sizeof(enum proc_cn_mcast_op) },
                        .op = PROC_CN_MCAST_LISTEN } };
    struct sigaction action = { .sa_handler = on_term };
    unsigned long forks = 0, execs = 0, exits = 0, others = 0, overruns = 0;
    unsigned long long last_ns = 0;
    int buffer = 4 << 20; /* doubled by the kernel */

    sigaction(SIGTERM, &action, NULL);
    int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_CONNECTOR);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || send(fd, &ask, sizeof ask, 0) < 0 ||
        (failures && narrow(fd))) {
        perror("proc connector");
        return 1;
    }
    int poll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wish = { .events = EPOLLIN, .data.fd = fd }, found;
    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &wish);
    puts("ready");
    fflush(stdout);
    while (!stop) {
        char datagram[256] __attribute__((aligned(8)));
        if (epoll_wait(poll, &found, 1, -1) < 1)
            continue;
        ssize_t length = recv(fd, datagram, sizeof datagram, 0);
        if (length < 0 && errno == ENOBUFS)
            overruns++;
        if (length < (ssize_t)(sizeof(struct nlmsghdr) + sizeof(struct cn_msg) + sizeof(struct proc_event)))
            continue;
        struct cn_msg *message = NLMSG_DATA((struct nlmsghdr *)datagram);
        struct proc_event event;
        memcpy(&event, message->data, sizeof event);
        switch ((unsigned)event.what) {
        case PROC_EVENT_FORK: forks++; break;
        case PROC_EVENT_EXEC: execs++; break;
        case PROC_EVENT_EXIT: exits++; break;
        default: others++;
        }
        last_ns = event.timestamp_ns;
        if (failures && times < MOST_TIMES) {
            struct timespec now;
            clock_gettime(CLOCK_MONOTONIC, &now);
            times_us[times++] = (now.tv_sec * 1000000000ULL + now.tv_nsec - last_ns) / 1000;
        }
    }
    qsort(times_us, times, sizeof *times_us, by_size);
    printf("{\"forks\": %lu, \"execs\": %lu, \"exits\": %lu, \"others\": %lu, \"overruns\": %lu, \"last_ns\": %llu, "
           "\"times\": {\"p50\": %u, \"p99\": %u, \"p99.9\": %u, \"max\": %u, \"count\": %u}}\n",
           forks, execs, exits, others, overruns, last_ns,
           quantile(times, 0.5), quantile(times, 0.99), quantile(times, 0.999), quantile(times, 1), times);
    return 0;
}
