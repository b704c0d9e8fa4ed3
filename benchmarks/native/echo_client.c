/* echo_client: loads a server and says what that cost.
 *
 * One thread, one epoll, N connections.  Each connection plays ping-pong: it sends one message, waits until the answer
 * is there in full, notes how long that took, and sends the next.  So there are always N messages under way, and the
 * server can't gain by letting some connections starve (those are counted, see "starved").
 *
 * The answer is the message itself, over TCP, a UNIX socket, TLS (--tls, where it was built with OpenSSL; the server's
 * certificate is taken as it is) or in a datagram (--udp, numbered; one without an answer is sent again and counted
 * as lost).  Or the message is an HTTP request, and the answer what its Content-Length says (--http).
 *
 * A run begins with one message on each connection, and goes on when all are answered, so that a server that accepts
 * slowly has all of them to serve.  Two phases follow.  In the warm-up every byte that comes back is compared with what
 * was sent; in the measured window only lengths are checked, so that this program stays much cheaper than the server
 * that it measures.  At both ends of the window the CPU clock of the server process (--watch PID) is read: user and
 * system time of all its threads, in nanoseconds, at the same moment as the message count.
 *
 * The result is one line of JSON on stdout.  Whatever goes wrong (a reset, a wrong byte, no progress for ten seconds)
 * is one line on stderr and exit status 1; a wrong command line is exit status 2.  With --hold it says "connected" and
 * waits for a line on stdin before the first message, and for another after the result, with all connections open:
 * time to attach a tracer to the server, and to detach it.
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
#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

#include "histogram.h"

#define NANOS 1000000000ull
#define STALL_MS 10000   /* no event for this long: the server has lost a message */
#define EVENTS 1024      /* events taken per epoll_wait */
#define RETRY_MS 200     /* a datagram without an answer for this long is sent again */
#define RESPONSE 8192    /* bytes of the greatest HTTP response, header and body */
#define SHIFTS 251       /* connection i sends the pattern from offset i % SHIFTS, so that mixed-up streams show */

/* ---- the run ----------------------------------------------------------------------------------------------------- */

struct options {
    const char *host, *path;
    int port, connections, watch;
    size_t size;
    double warmup, seconds;
    uint64_t messages;
    bool tls, udp, http, hold;
};

struct connection {
    int fd;
    const char *message;
    size_t sent, received;  /* of the message under way */
    uint64_t started_ns;
    uint64_t echoes;        /* in the measured window */
    uint64_t number;        /* of the datagram under way, */
    uint64_t sent_ns;       /* and when it was sent last */
    char *response;         /* the beginning of an HTTP response, until its header is complete */
    size_t expected;        /* bytes of the whole response, 0 as long as that is unknown */
    void *tls;              /* SSL */
    bool awaits_room;       /* EPOLLOUT is armed */
};

static const char request[] = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: echo_client\r\nAccept: */*\r\n\r\n";

static struct options options = {
    .host = "127.0.0.1", .connections = 100, .size = 1024, .warmup = 0.2, .seconds = 1.0,
};
static int epoll_fd;
static struct connection *connections;
static char *scratch;
static size_t scratch_size = 256 * 1024;
static bool greeting, measuring;
static uint64_t messages, sum_ns, lost;

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

/* ---- bytes in and out: the socket, or TLS over it; -1 and EAGAIN if it has to wait -------------------------------- */

#ifdef WITH_TLS

static SSL_CTX *tls_context;

static ssize_t tls_result(struct connection *connection, int count, const char *what)
{
    if (count > 0)
        return count;
    int error = SSL_get_error(connection->tls, count);
    if (error == SSL_ERROR_ZERO_RETURN)
        return 0;
    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
        fail("TLS %s: %s", what,
             error == SSL_ERROR_SYSCALL ? strerror(errno) : ERR_reason_error_string(ERR_get_error()));
    errno = EAGAIN;
    return -1;
}

static ssize_t write_some(struct connection *connection, const char *bytes, size_t length)
{
    if (!connection->tls)
        return send(connection->fd, bytes, length, MSG_NOSIGNAL);
    return tls_result(connection, SSL_write(connection->tls, bytes, (int)length), "write");
}

static ssize_t read_some(struct connection *connection, char *bytes, size_t length)
{
    if (!connection->tls)
        return recv(connection->fd, bytes, length, 0);
    return tls_result(connection, SSL_read(connection->tls, bytes, (int)length), "read");
}

/* The handshake, on a socket that still blocks. */
static void start_tls(struct connection *connection)
{
    if (!tls_context) {
        tls_context = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    }
    connection->tls = SSL_new(tls_context);
    if (!connection->tls || !SSL_set_fd(connection->tls, connection->fd) || SSL_connect(connection->tls) != 1)
        fail("the TLS handshake failed: %s", ERR_reason_error_string(ERR_get_error()));
}

#else

static ssize_t write_some(struct connection *connection, const char *bytes, size_t length)
{
    return send(connection->fd, bytes, length, MSG_NOSIGNAL);
}

static ssize_t read_some(struct connection *connection, char *bytes, size_t length)
{
    return recv(connection->fd, bytes, length, 0);
}

static void start_tls(struct connection *connection)
{
    (void)connection;
    fail("built without OpenSSL");
}

#endif

/* ---- one message after the other --------------------------------------------------------------------------------- */

static void send_more(struct connection *connection)
{
    while (connection->sent < options.size) {
        ssize_t count = write_some(connection, connection->message + connection->sent, options.size - connection->sent);
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

/* The datagram under way: its number, then the rest of the message. */
static void send_datagram(struct connection *connection, uint64_t now_ns)
{
    struct iovec parts[] = {
        {.iov_base = &connection->number, .iov_len = sizeof connection->number},
        {.iov_base = (char *)connection->message + sizeof connection->number,
         .iov_len = options.size - sizeof connection->number},
    };
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = 2};
    connection->sent_ns = now_ns;
    /* No room, or refused because the server's own socket was full: as good as lost, and sent again later. */
    if (sendmsg(connection->fd, &header, MSG_NOSIGNAL) < 0 && errno != EAGAIN && errno != ENOBUFS)
        fail("send: %s", strerror(errno));
}

static void start_message(struct connection *connection, uint64_t now_ns)
{
    connection->sent = connection->received = 0;
    connection->started_ns = now_ns;
    connection->number++;
    if (options.udp)
        send_datagram(connection, now_ns);
    else
        send_more(connection);
}

static void finish_message(struct connection *connection)
{
    uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
    if (measuring) {
        histogram[bucket_of(now_ns - connection->started_ns)]++;
        sum_ns += now_ns - connection->started_ns;
        connection->echoes++;
    }
    messages++;
    if (!greeting)
        start_message(connection, now_ns);
}

static bool must_wait(void)
{
    return errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK;
}

static void on_echo(struct connection *connection)
{
    do {
        ssize_t count = read_some(connection, scratch, scratch_size);
        if (count < 0) {
            if (must_wait())
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
        if (connection->received == options.size) {
            finish_message(connection);
            return;
        }
    } while (connection->tls); /* it hands out one record at a time */
}

static void on_datagram(struct connection *connection)
{
    uint64_t number;
    ssize_t count = recv(connection->fd, scratch, scratch_size, 0);
    if (count < 0) {
        if (must_wait())
            return;
        fail("recv: %s", strerror(errno));
    }
    if ((size_t)count != options.size)
        fail("a datagram of %zd bytes came back for one of %zu", count, options.size);
    memcpy(&number, scratch, sizeof number);
    if (number > connection->number)
        fail("a datagram came back that was not sent");
    if (number < connection->number)
        return; /* sent twice, and answered twice */
    if (!measuring &&
        memcmp(scratch + sizeof number, connection->message + sizeof number, options.size - sizeof number))
        fail("other bytes came back than were sent");
    finish_message(connection);
}

static void resend_datagrams(uint64_t now_ns)
{
    for (int i = 0; i < options.connections; i++)
        if (now_ns - connections[i].sent_ns > RETRY_MS * 1000000ull) {
            lost += measuring;
            send_datagram(&connections[i], now_ns);
        }
}

/* Bytes of the whole response, or 0 as long as its header is not complete. */
static size_t response_length(const char *response, size_t received)
{
    static const char name[] = "\r\ncontent-length:";
    const char *end = memmem(response, received, "\r\n\r\n", 4);
    if (!end)
        return 0;
    if (strncmp(response, "HTTP/1.1 200 ", 13))
        fail("the server answered %.*s", (int)strcspn(response, "\r\n"), response);
    const char *length = strcasestr(response, name);
    if (!length || length > end)
        fail("a response has no Content-Length");
    return (size_t)(end + 4 - response) + (size_t)atol(length + sizeof name - 1);
}

static void on_response(struct connection *connection)
{
    if (!connection->response && !(connection->response = malloc(RESPONSE + 1)))
        fail("out of memory");
    bool body = connection->expected > 0;
    char *room = body ? scratch : connection->response + connection->received;
    ssize_t count = recv(connection->fd, room, body ? scratch_size : RESPONSE - connection->received, 0);
    if (count < 0 && must_wait())
        return;
    if (count < 0)
        fail("recv: %s", strerror(errno));
    if (count == 0)
        fail(!body && connection->received == RESPONSE ? "a header is too long" : "the server closed a connection");
    connection->received += (size_t)count;
    if (!body) {
        connection->response[connection->received] = 0;
        connection->expected = response_length(connection->response, connection->received);
    }
    if (connection->expected && connection->received > connection->expected)
        fail("more came back than one response");
    if (connection->expected == connection->received) {
        connection->expected = 0;
        finish_message(connection);
    }
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
        fd = socket(AF_INET, (options.udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
            fail("connect to %s:%d: %s", options.host, options.port, strerror(errno));
        if (!options.udp)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    return fd;
}

static void open_connection(struct connection *connection, const char *message)
{
    connection->fd = connect_one();
    connection->message = message;
    if (options.tls)
        start_tls(connection);
    if (fcntl(connection->fd, F_SETFL, O_NONBLOCK))
        fail("fcntl: %s", strerror(errno));
    arm(connection, EPOLL_CTL_ADD);
}

/* Handle events until `until_ns`, or until `limit` messages are through if that is not 0. */
static void run(uint64_t until_ns, uint64_t limit)
{
    static struct epoll_event events[EVENTS];
    void (*on_readable)(struct connection *) = options.http ? on_response : options.udp ? on_datagram : on_echo;
    uint64_t progress = messages, progress_ns = clock_ns(CLOCK_MONOTONIC), swept_ns = progress_ns;
    for (;;) {
        uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
        if (limit ? messages >= limit : now_ns >= until_ns)
            return;
        if (messages != progress) {
            progress = messages;
            progress_ns = now_ns;
        } else if (now_ns - progress_ns > STALL_MS * 1000000ull) {
            fail("no echo for %d seconds", STALL_MS / 1000);
        }
        if (options.udp && now_ns - swept_ns > RETRY_MS * 250000ull) {
            swept_ns = now_ns;
            resend_datagrams(now_ns);
        }
        int count = epoll_wait(epoll_fd, events, EVENTS, RETRY_MS / 4);
        if (count < 0 && errno != EINTR)
            fail("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (events[i].events & EPOLLOUT)
                send_more(connection);
            if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
                on_readable(connection);
        }
    }
}

static void wait_for_line(void)
{
    fflush(stdout);
    for (int c = getchar(); c != '\n' && c != EOF; c = getchar())
        ;
}

/* ---- command line ------------------------------------------------------------------------------------------------ */

static void usage(void)
{
    fputs("usage: echo_client (--port PORT [--host IPV4] | --unix PATH) [--tls | --udp | --http]\n"
          "                   [--connections N] [--size BYTES] [--warmup SECONDS] [--seconds SECONDS | --messages N]\n"
          "                   [--watch PID] [--hold]\n", stderr);
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
        {"watch", required_argument, NULL, 'x'},    {"tls", no_argument, NULL, 'l'},
        {"udp", no_argument, NULL, 'd'},            {"http", no_argument, NULL, 'r'},
        {"hold", no_argument, NULL, 'o'},           {NULL, 0, NULL, 0},
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
        case 'l': options.tls = true; break;
        case 'd': options.udp = true; break;
        case 'r': options.http = true; options.size = sizeof request - 1; break;
        case 'o': options.hold = true; break;
        default: usage();
        }
    }
    if (optind != argc || !options.port == !options.path || options.connections < 1 || options.size < 1 ||
        options.tls + options.udp + options.http > 1 || (options.udp && (options.path || options.size < 8)))
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
    connections = calloc((size_t)options.connections, sizeof *connections);
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
    for (int i = 0; i < options.connections; i++)
        open_connection(&connections[i], options.http ? request : pattern + i % SHIFTS);
    if (options.hold) {
        puts("connected");
        wait_for_line();
    }
    greeting = true;
    for (int i = 0; i < options.connections; i++)
        start_message(&connections[i], clock_ns(CLOCK_MONOTONIC));
    run(0, (uint64_t)options.connections);

    greeting = false;
    for (int i = 0; i < options.connections; i++)
        start_message(&connections[i], clock_ns(CLOCK_MONOTONIC));
    run(clock_ns(CLOCK_MONOTONIC) + (uint64_t)(options.warmup * 1e9), 0);

    measuring = true;
    uint64_t warmup_messages = messages;
    messages = 0;
    uint64_t cpu_ns = server_cpu_ns(), begin_ns = clock_ns(CLOCK_MONOTONIC);
    run(begin_ns + (uint64_t)(options.seconds * 1e9), options.messages);
    cpu_ns = server_cpu_ns() - cpu_ns;
    double seconds = (double)(clock_ns(CLOCK_MONOTONIC) - begin_ns) / 1e9;

    int starved = 0;
    for (int i = 0; i < options.connections; i++)
        starved += connections[i].echoes == 0;
    printf("{\"messages\": %llu, \"warmup_messages\": %llu, \"seconds\": %.6f, \"messages_per_second\": %.1f, "
           "\"mean_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"server_cpu_seconds\": %.9f, "
           "\"starved\": %d, \"lost\": %llu}\n",
           (unsigned long long)messages, (unsigned long long)warmup_messages, seconds, (double)messages / seconds,
           messages ? (double)sum_ns / (double)messages / 1e3 : 0.0, percentile_us(messages, 0.50),
           percentile_us(messages, 0.99), (double)cpu_ns / 1e9, starved, (unsigned long long)lost);
    if (options.hold)
        wait_for_line();
    return 0;
}
