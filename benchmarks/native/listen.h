/* What both servers in C share: their command line, and the socket that they listen on. */
#ifndef LISTEN_H
#define LISTEN_H

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#define BACKLOG 1024
#define DATAGRAM_ROOM (8 * 1024 * 1024) /* as servers/echo_server.py asks for */

struct listening {
    const char *host, *path; /* path: a UNIX socket, NULL if none */
    int port;
    bool udp, check; /* check: only try what the server needs, and end */
};

/* Read the command line, or end with its usage; also raise the limit of open files as far as allowed. */
static struct listening parse(int argc, char **argv, const char *program, bool knows_udp)
{
    static const struct option names[] = {
        {"host", required_argument, NULL, 'h'}, {"port", required_argument, NULL, 'p'},
        {"unix", required_argument, NULL, 'u'}, {"udp", no_argument, NULL, 'd'},
        {"check", no_argument, NULL, 'c'},      {NULL, 0, NULL, 0},
    };
    struct listening where = {.host = "127.0.0.1"};
    bool understood = true;
    int name;
    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'h': where.host = optarg; break;
        case 'p': where.port = atoi(optarg); break;
        case 'u': where.path = optarg; break;
        case 'd': where.udp = true; break;
        case 'c': where.check = true; break;
        default: understood = false;
        }
    }
    if (!understood || optind != argc || (where.udp && !knows_udp)) {
        fprintf(stderr, "usage: %s [--check] %s[--host IPV4] [--port PORT] | --unix PATH\n", program,
                knows_udp ? "[--udp] " : "");
        exit(2);
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    return where;
}

static int listen_tcp(const struct listening *where, int flags)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)where->port)};
    socklen_t length = sizeof address;
    int on = 1;
    int fd = socket(AF_INET, (where->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC | flags, 0);
    if (fd < 0)
        return -1;
    if (inet_pton(AF_INET, where->host, &address.sin_addr) != 1) {
        errno = EINVAL;
        return -1;
    }
    if (where->udp) {
        int room = DATAGRAM_ROOM;
        if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room))
            setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    } else {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || (!where->udp && listen(fd, BACKLOG)) ||
        getsockname(fd, (struct sockaddr *)&address, &length))
        return -1;
    printf("listening %d\n", ntohs(address.sin_port));
    return fd;
}

static int listen_unix(const char *path, int flags)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG))
        return -1;
    printf("listening %s\n", path);
    return fd;
}

/* The socket, made with these `flags` of socket(2), or -1 with errno.  Says on stdout where it listens. */
static int start_listening(const struct listening *where, int flags)
{
    int fd = where->path ? listen_unix(where->path, flags) : listen_tcp(where, flags);
    fflush(stdout);
    return fd;
}

#endif
