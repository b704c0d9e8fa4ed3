/* epoll_server: the echo server that an event loop is measured against, as plain as C and epoll allow.
 *
 * One thread, level-triggered epoll.  A readable connection is read once, into one buffer that all connections share,
 * and what came is sent back at once.  What the socket does not take is kept by the connection; until that is through,
 * the connection is not read (so a peer that never reads costs one buffer, no more).
 *
 * With --udp it is one socket, and every datagram goes back to where it came from.
 *
 * It prints "listening PORT" (or PATH) when it accepts, and serves until a signal ends it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "listen.h"

#define EVENTS 1024
#define BUFFER (256 * 1024)
#define DATAGRAMS 64 /* answered per event, at most */

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

/* Answer a batch of datagrams, one by one.  What the socket has no room for is lost, as datagrams may be. */
static void on_datagrams(int fd)
{
    struct sockaddr_storage from;
    for (int i = 0; i < DATAGRAMS; i++) {
        socklen_t from_length = sizeof from;
        ssize_t length = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&from, &from_length);
        if (length < 0)
            return;
        (void)sendto(fd, buffer, (size_t)length, 0, (struct sockaddr *)&from, from_length);
    }
}

int main(int argc, char **argv)
{
    struct listening where = parse(argc, argv, "epoll_server", true);
    if (where.check)
        return 0;
    int listener = start_listening(&where, SOCK_NONBLOCK);
    if (listener < 0)
        fail("listen");
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
            if (!connection && where.udp)
                on_datagrams(listener);
            else if (!connection)
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
