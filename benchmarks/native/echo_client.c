/* echo_client: loads an echo server and says what that cost.
 *
 * One thread, one epoll, N connections.  Each connection plays ping-pong: it sends one message, waits until as many
 * bytes have come back, notes how long that took, and sends the next.  So there are always N messages under way, and
 * the server can't gain by letting some connections starve (those are counted, see "starved").
 *
 * A run has two phases.  In the warm-up every byte that comes back is compared with what was sent; in the measured
 * window only lengths are checked, so that this program stays much cheaper than the server that it measures.  At both
 * ends of the window the CPU clock of the server process (--watch PID) is read: user and system time of all its
 * threads, in nanoseconds, at the same moment as the message count.
 *
 * The result is one line of JSON on stdout.  Whatever goes wrong (a reset, a wrong byte, no progress for ten seconds)
 * is one line on stderr and exit status 1; a wrong command line is exit status 2.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NANOS 1000000000ull
#define STALL_MS 10000   /* no event for this long: the server has lost a message */
#define EVENTS 1024      /* events taken per epoll_wait */
#define SHIFTS 251       /* connection i sends the pattern from offset i % SHIFTS, so that mixed-up streams show */

/* ---- latency histogram ------------------------------------------------------------------------------------------
 * Log-linear: each power of two is cut into 64 equal buckets, so a value is known to 1.6 % in constant memory. */

#define SUB_BITS 6
#define SUB (1u << SUB_BITS)
static uint64_t histogram[(64 - SUB_BITS + 1) * SUB];

static unsigned bucket_of(uint64_t value)
{
    if (value < SUB)
        return (unsigned)value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - SUB_BITS;
    return (shift + 1) * SUB + (unsigned)((value >> shift) - SUB);
}

static uint64_t bucket_middle(unsigned bucket)
{
    if (bucket < SUB)
        return bucket;
    unsigned shift = bucket / SUB - 1;
    return ((uint64_t)(bucket % SUB + SUB) << shift) + ((1ull << shift) >> 1);
}

static double percentile_us(uint64_t total, double share)
{
    uint64_t rank = (uint64_t)((double)total * share), seen = 0;
    for (unsigned bucket = 0; bucket < sizeof histogram / sizeof histogram[0]; bucket++) {
        seen += histogram[bucket];
        if (seen > rank)
            return (double)bucket_middle(bucket) / 1e3;
    }
    return 0.0;
}

/* ---- the run ----------------------------------------------------------------------------------------------------- */

struct options {
    const char *host, *path;
    int port, connections, watch;
    size_t size;
    double warmup, seconds;
    uint64_t messages;
};

struct connection {
    int fd;
    const char *message;
    size_t sent, received;  /* of the message under way */
    uint64_t started_ns;
    uint64_t echoes;        /* in the measured window */
    bool awaits_room;       /* EPOLLOUT is armed */
};

static struct options options = {
    .host = "127.0.0.1", .connections = 100, .size = 1024, .warmup = 0.2, .seconds = 1.0,
};
static int epoll_fd;
static char *scratch;
static size_t scratch_size = 256 * 1024;
static bool measuring;
static uint64_t messages;

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("echo_client: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    if (clock_gettime(clock, &now))
        fail("clock_gettime: %s", strerror(errno));
    return (uint64_t)now.tv_sec * NANOS + (uint64_t)now.tv_nsec;
}

/* CPU time of the watched process so far, 0 if none is watched. */
static uint64_t server_cpu_ns(void)
{
    clockid_t clock;
    if (!options.watch)
        return 0;
    int error = clock_getcpuclockid(options.watch, &clock);
    if (error)
        fail("no CPU clock of process %d: %s", options.watch, strerror(error));
    return clock_ns(clock);
}

static void arm(struct connection *connection, int how)
{
    struct epoll_event event = {
        .events = EPOLLIN | (connection->awaits_room ? EPOLLOUT : 0u),
        .data.ptr = connection,
    };
    if (epoll_ctl(epoll_fd, how, connection->fd, &event))
        fail("epoll_ctl: %s", strerror(errno));
}

static void send_more(struct connection *connection)
{
    while (connection->sent < options.size) {
        ssize_t count = send(connection->fd, connection->message + connection->sent,
                             options.size - connection->sent, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                break;
            fail("send: %s", strerror(errno));
        }
        connection->sent += (size_t)count;
    }
    bool awaits_room = connection->sent < options.size;
    if (awaits_room != connection->awaits_room) {
        connection->awaits_room = awaits_room;
        arm(connection, EPOLL_CTL_MOD);
    }
}

static void start_message(struct connection *connection, uint64_t now_ns)
{
    connection->sent = connection->received = 0;
    connection->started_ns = now_ns;
    send_more(connection);
}

static void receive_more(struct connection *connection)
{
    ssize_t count = recv(connection->fd, scratch, scratch_size, 0);
    if (count < 0) {
        if (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)
            return;
        fail("recv: %s", strerror(errno));
    }
    if (count == 0)
        fail("the server closed a connection");
    if (connection->received + (size_t)count > connection->sent)
        fail("more came back than was sent: %zu of %zu bytes", connection->received + (size_t)count,
             connection->sent);
    if (!measuring && memcmp(scratch, connection->message + connection->received, (size_t)count))
        fail("other bytes came back than were sent");
    connection->received += (size_t)count;
    if (connection->received < options.size)
        return;

    uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
    if (measuring) {
        histogram[bucket_of(now_ns - connection->started_ns)]++;
        connection->echoes++;
    }
    messages++;
    start_message(connection, now_ns);
}

static int connect_one(void)
{
    int fd;
    if (options.path) {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        if (strlen(options.path) >= sizeof address.sun_path)
            fail("the socket path is too long: %s", options.path);
        strcpy(address.sun_path, options.path);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
            fail("connect to %s: %s", options.path, strerror(errno));
    } else {
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
        int on = 1;
        if (inet_pton(AF_INET, options.host, &address.sin_addr) != 1)
            fail("not an IPv4 address: %s", options.host);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
            fail("connect to %s:%d: %s", options.host, options.port, strerror(errno));
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    if (fcntl(fd, F_SETFL, O_NONBLOCK))
        fail("fcntl: %s", strerror(errno));
    return fd;
}

/* Handle events until `until_ns`, or until `limit` messages are through if that is not 0. */
static void run(uint64_t until_ns, uint64_t limit)
{
    static struct epoll_event events[EVENTS];
    while (limit ? messages < limit : clock_ns(CLOCK_MONOTONIC) < until_ns) {
        int count = epoll_wait(epoll_fd, events, EVENTS, STALL_MS);
        if (count == 0)
            fail("no echo for %d seconds", STALL_MS / 1000);
        if (count < 0 && errno != EINTR)
            fail("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (events[i].events & EPOLLOUT)
                send_more(connection);
            if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
                receive_more(connection);
        }
    }
}

/* ---- command line ------------------------------------------------------------------------------------------------ */

static void usage(void)
{
    fputs("usage: echo_client (--port PORT [--host IPV4] | --unix PATH) [--connections N] [--size BYTES]\n"
          "                   [--warmup SECONDS] [--seconds SECONDS | --messages N] [--watch PID]\n", stderr);
    exit(2);
}

static double positive(const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value > 0))
        usage();
    return value;
}

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        {"host", required_argument, NULL, 'h'},     {"port", required_argument, NULL, 'p'},
        {"unix", required_argument, NULL, 'u'},     {"connections", required_argument, NULL, 'c'},
        {"size", required_argument, NULL, 's'},     {"warmup", required_argument, NULL, 'w'},
        {"seconds", required_argument, NULL, 't'},  {"messages", required_argument, NULL, 'm'},
        {"watch", required_argument, NULL, 'x'},    {NULL, 0, NULL, 0},
    };
    int name;
    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'h': options.host = optarg; break;
        case 'p': options.port = (int)positive(optarg); break;
        case 'u': options.path = optarg; break;
        case 'c': options.connections = (int)positive(optarg); break;
        case 's': options.size = (size_t)positive(optarg); break;
        case 'w': options.warmup = positive(optarg); break;
        case 't': options.seconds = positive(optarg); break;
        case 'm': options.messages = (uint64_t)positive(optarg); break;
        case 'x': options.watch = (int)positive(optarg); break;
        default: usage();
        }
    }
    if (optind != argc || !options.port == !options.path || options.connections < 1 || options.size < 1)
        usage();
}

int main(int argc, char **argv)
{
    parse(argc, argv);

    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    char *pattern = malloc(options.size + SHIFTS);
    struct connection *connections = calloc((size_t)options.connections, sizeof *connections);
    scratch = malloc(scratch_size);
    if (!pattern || !connections || !scratch)
        fail("out of memory");
    uint32_t state = 1;
    for (size_t i = 0; i < options.size + SHIFTS; i++) {
        state = state * 1664525u + 1013904223u;
        pattern[i] = (char)(state >> 24);
    }

    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        fail("epoll_create1: %s", strerror(errno));
    for (int i = 0; i < options.connections; i++) {
        connections[i] = (struct connection){.fd = connect_one(), .message = pattern + i % SHIFTS};
        arm(&connections[i], EPOLL_CTL_ADD);
    }
    for (int i = 0; i < options.connections; i++)
        start_message(&connections[i], clock_ns(CLOCK_MONOTONIC));

    run(clock_ns(CLOCK_MONOTONIC) + (uint64_t)(options.warmup * 1e9), 0);

    measuring = true;
    messages = 0;
    uint64_t cpu_ns = server_cpu_ns(), begin_ns = clock_ns(CLOCK_MONOTONIC);
    run(begin_ns + (uint64_t)(options.seconds * 1e9), options.messages);
    cpu_ns = server_cpu_ns() - cpu_ns;
    double seconds = (double)(clock_ns(CLOCK_MONOTONIC) - begin_ns) / 1e9;

    int starved = 0;
    for (int i = 0; i < options.connections; i++)
        starved += connections[i].echoes == 0;
    printf("{\"messages\": %llu, \"seconds\": %.6f, \"messages_per_second\": %.1f, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"server_cpu_seconds\": %.9f, \"starved\": %d}\n",
           (unsigned long long)messages, seconds, (double)messages / seconds, percentile_us(messages, 0.50),
           percentile_us(messages, 0.99), (double)cpu_ns / 1e9, starved);
    return 0;
}
