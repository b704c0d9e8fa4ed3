/* epoll_server: the echo server that an event loop is measured against, as plain as C and epoll allow.
 *
 * One thread, level-triggered epoll.  A readable connection is read once, into one buffer that all connections share,
 * and what came is sent back at once.  What the socket does not take is kept by the connection; until that is through,
 * the connection is not read (so a peer that never reads costs one buffer, no more).
 *
 * It prints "listening PORT" (or PATH) when it accepts, and serves until a signal ends it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define EVENTS 1024
#define BUFFER (256 * 1024)
#define BACKLOG 1024

struct connection {
    int fd;
    char *kept;               /* what still has to go out, NULL if nothing */
    size_t offset, length;
};

static int epoll_fd;
static char buffer[BUFFER];

static void fail(const char *what)
{
    fprintf(stderr, "epoll_server: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void drop(struct connection *connection)
{
    close(connection->fd);
    free(connection->kept);
    free(connection);
}

static int arm(struct connection *connection, uint32_t events, int how)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    return epoll_ctl(epoll_fd, how, connection->fd, &event);
}

/* Send; the bytes that went out, or -1 if the connection is lost. */
static ssize_t send_some(struct connection *connection, const char *bytes, size_t length)
{
    ssize_t sent = send(connection->fd, bytes, length, MSG_NOSIGNAL);
    if (sent >= 0)
        return sent;
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -1;
}

static void on_readable(struct connection *connection)
{
    ssize_t length = recv(connection->fd, buffer, sizeof buffer, 0);
    if (length < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (length <= 0) {
        drop(connection);
        return;
    }
    ssize_t sent = send_some(connection, buffer, (size_t)length);
    if (sent == length)
        return;
    if (sent < 0 || !(connection->kept = malloc((size_t)(length - sent)))) {
        drop(connection);
        return;
    }
    connection->offset = 0;
    connection->length = (size_t)(length - sent);
    memcpy(connection->kept, buffer + sent, connection->length);
    if (arm(connection, EPOLLOUT, EPOLL_CTL_MOD))
        drop(connection);
}

static void on_writable(struct connection *connection)
{
    ssize_t sent = send_some(connection, connection->kept + connection->offset,
                             connection->length - connection->offset);
    if (sent < 0) {
        drop(connection);
        return;
    }
    connection->offset += (size_t)sent;
    if (connection->offset < connection->length)
        return;
    free(connection->kept);
    connection->kept = NULL;
    if (arm(connection, EPOLLIN, EPOLL_CTL_MOD))
        drop(connection);
}

static void on_connection(int listener)
{
    int on = 1;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* refused, and without need, on a UNIX socket */
    struct connection *connection = calloc(1, sizeof *connection);
    if (!connection) {
        close(fd);
        return;
    }
    connection->fd = fd;
    if (arm(connection, EPOLLIN, EPOLL_CTL_ADD))
        drop(connection);
}

static int listen_tcp(const char *host, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    socklen_t length = sizeof address;
    int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        errno = EINVAL;
        fail(host);
    }
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG))
        fail("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &length))
        fail("getsockname");
    printf("listening %d\n", ntohs(address.sin_port));
    return fd;
}

static int listen_unix(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        fail(path);
    }
    strcpy(address.sun_path, path);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG))
        fail(path);
    printf("listening %s\n", path);
    return fd;
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        {"host", required_argument, NULL, 'h'},
        {"port", required_argument, NULL, 'p'},
        {"unix", required_argument, NULL, 'u'},
        {NULL, 0, NULL, 0},
    };
    const char *host = "127.0.0.1", *path = NULL;
    int port = 0, name;
    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'h': host = optarg; break;
        case 'p': port = atoi(optarg); break;
        case 'u': path = optarg; break;
        default:
            fputs("usage: epoll_server [--host IPV4] [--port PORT] | --unix PATH\n", stderr);
            return 2;
        }
    }

    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    int listener = path ? listen_unix(path) : listen_tcp(host, port);
    fflush(stdout);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event accepting = {.events = EPOLLIN, .data.ptr = NULL}; /* NULL: the listener */
    if (epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &accepting))
        fail("epoll");

    static struct epoll_event events[EVENTS];
    for (;;) {
        int count = epoll_wait(epoll_fd, events, EVENTS, -1);
        if (count < 0 && errno != EINTR)
            fail("epoll_wait");
        /* Each connection is listed once per batch and freed only here, on its own turn: no event outlives it. */
        for (int i = 0; i < count; i++) {
            struct connection *connection = events[i].data.ptr;
            if (!connection)
                on_connection(listener);
            else if (connection->kept && events[i].events & (EPOLLERR | EPOLLHUP))
                drop(connection);
            else if (connection->kept)
                on_writable(connection);
            else
                on_readable(connection);
        }
    }
}
