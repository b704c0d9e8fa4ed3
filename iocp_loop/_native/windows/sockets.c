/* The requests of sockets, and their addresses. */

#include "shared.h"

typedef char accept_fits[2 * (sizeof(SOCKADDR_STORAGE) + 16) <= IOCP_AREA_SIZE ? 1 : -1];
typedef char host_fits[INET6_ADDRSTRLEN <= IOCP_HOST_SIZE ? 1 : -1];

/* winsock2/nf-winsock2-wsarecv.  With size 0 it waits until something can be received, and receives nothing. */
long iocp_receive(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, buffer};
    sub->flags = 0;
    return socket_result(WSARecv(socket, &piece, 1, &sub->bytes, &sub->flags, overlapped, NULL));
}

/* winsock2/nf-winsock2-wsasend */
long iocp_send(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, (char *)buffer};
    return socket_result(WSASend(socket, &piece, 1, &sub->bytes, 0, overlapped, NULL));
}

long iocp_send_gathered(uintptr_t socket, iocp_submission *sub, int count, void **buffers, unsigned long *sizes)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF pieces[IOCP_GATHER_LIMIT];
    if (count > IOCP_GATHER_LIMIT)
        return WSAEINVAL;
    for (int n = 0; n < count; n++) {
        pieces[n].buf = buffers[n];
        pieces[n].len = sizes[n];
    }
    return socket_result(WSASend(socket, pieces, count, &sub->bytes, 0, overlapped, NULL));
}

/* winsock2/nf-winsock2-wsarecvfrom.  The sender's address is in the submission then. */
long iocp_receive_from(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, buffer};
    sub->flags = 0;
    sub->address_length = IOCP_AREA_SIZE;
    return socket_result(WSARecvFrom(socket, &piece, 1, &sub->bytes, &sub->flags, area_of(sub),
                                     &sub->address_length, overlapped, NULL));
}

/* winsock2/nf-winsock2-wsasendto, to the address in the submission (iocp_set_address). */
long iocp_send_to(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, (char *)buffer};
    return socket_result(WSASendTo(socket, &piece, 1, &sub->bytes, 0, area_of(sub), sub->address_length,
                                   overlapped, NULL));
}

enum { ADDRESS_ROOM = sizeof(SOCKADDR_STORAGE) + 16 };

/* mswsock/nf-mswsock-acceptex.  The socket for the connection is made here, not inherited by child processes; it is
 * in sub->accepted, and the caller's to close unless the connection is taken over. */
long iocp_accept(uintptr_t listener, iocp_submission *sub, int family, int type, int protocol)
{
    OVERLAPPED *overlapped = prepare(sub, listener);
    SOCKET s = WSASocketW(family, type, protocol, NULL, 0, WSA_FLAG_OVERLAPPED | WSA_FLAG_NO_HANDLE_INHERIT);
    long error;
    sub->accepted = 0;
    if (s == INVALID_SOCKET)
        return WSAGetLastError();
    ZeroMemory(sub->area, sizeof sub->area); /* no address, should the entry come without one */
    error = socket_result(!found.accept_ex(listener, s, sub->area, 0, ADDRESS_ROOM, ADDRESS_ROOM, &sub->bytes,
                                           overlapped));
    if (error && error != ERROR_IO_PENDING)
        closesocket(s);
    else
        sub->accepted = s;
    return error;
}

/* Make the accepted socket one that knows its listener (SO_UPDATE_ACCEPT_CONTEXT: getpeername, shutdown and the rest
 * fail without it), and leave the peer's address in the submission. */
long iocp_accept_finish(uintptr_t listener, iocp_submission *sub)
{
    SOCKADDR *local = NULL, *remote = NULL;
    int local_length = 0, remote_length = 0;
    SOCKET parent = listener;
    if (setsockopt(sub->accepted, SOL_SOCKET, SO_UPDATE_ACCEPT_CONTEXT, (char *)&parent, sizeof parent))
        return WSAGetLastError();
    found.accept_addresses(sub->area, 0, ADDRESS_ROOM, ADDRESS_ROOM, &local, &local_length, &remote, &remote_length);
    MoveMemory(sub->area, remote, remote_length);
    sub->address_length = remote_length;
    return 0;
}

/* To connect to the address "any" means to connect to this machine; ConnectEx takes that for a mistake.  And whether
 * an address is this machine's. */
static BOOL is_loopback(SOCKADDR *address)
{
    if (address->sa_family == AF_INET6) {
        IN6_ADDR *six = &((SOCKADDR_IN6 *)address)->sin6_addr;
        if (IN6_IS_ADDR_UNSPECIFIED(six))
            *six = in6addr_loopback;
        return IN6_IS_ADDR_LOOPBACK(six) || (IN6_IS_ADDR_V4MAPPED(six) && six->s6_addr[12] == 127);
    }
    IN_ADDR *four = &((SOCKADDR_IN *)address)->sin_addr;
    if (four->s_addr == htonl(INADDR_ANY))
        four->s_addr = htonl(INADDR_LOOPBACK);
    return (ntohl(four->s_addr) >> 24) == 127;
}

#ifndef SIO_TCP_INITIAL_RTO /* winsock/winsock-ioctls, api/mstcpip/ns-mstcpip-tcp_initial_rto_parameters */
#define SIO_TCP_INITIAL_RTO 0x98000011
#endif

/* Windows asks again for some 2 s where the answer was a refusal.  On this machine that is of no use. */
static void take_the_first_refusal(SOCKET socket)
{
    struct {
        USHORT round_trip_ms;
        UCHAR retransmissions;
    } parameters = {(USHORT)-1, (UCHAR)-2}; /* unspecified; none */
    DWORD bytes = 0;
    WSAIoctl(socket, SIO_TCP_INITIAL_RTO, &parameters, sizeof parameters, NULL, 0, &bytes, NULL, NULL);
}

/* mswsock/nc-mswsock-lpfn_connectex, to the address in the submission.  ConnectEx wants a bound socket; one that is
 * not yet gets any address and port; WSAEINVAL: it is (winsock2/nf-winsock2-bind). */
long iocp_connect(uintptr_t socket, iocp_submission *sub)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    SOCKADDR *address = area_of(sub);
    SOCKADDR_STORAGE own = {0};
    own.ss_family = address->sa_family;
    if (bind(socket, (SOCKADDR *)&own, sub->address_length) != 0 && WSAGetLastError() != WSAEINVAL)
        return WSAGetLastError();
    if (is_loopback(address))
        take_the_first_refusal(socket);
    return socket_result(
        !found.connect_ex(socket, address, sub->address_length, NULL, 0, &sub->bytes, overlapped));
}

/* SO_UPDATE_CONNECT_CONTEXT: without it the connected socket knows neither its peer nor shutdown. */
long iocp_connect_finish(uintptr_t socket)
{
    return socket_result(setsockopt(socket, SOL_SOCKET, SO_UPDATE_CONNECT_CONTEXT, NULL, 0));
}

/* mswsock/nf-mswsock-transmitfile: `count` bytes (at most 2 GiB - 1) of `file` from `offset` on. */
long iocp_transmit_file(uintptr_t socket, iocp_submission *sub, uintptr_t file, unsigned long long offset,
                        unsigned long count)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    overlapped->Offset = (DWORD)offset;
    overlapped->OffsetHigh = (DWORD)(offset >> 32);
    long error = socket_result(!found.transmit_file(socket, (HANDLE)file, count, 0, overlapped, NULL, 0));
    if (!error) /* the only request that does not say how many bytes it has moved at once */
        sub->bytes = (unsigned long)overlapped->InternalHigh;
    return error;
}

/* A numeric address that is not written in full: with %scope, or as 127.1. */
static long parse_address(iocp_submission *sub, int family, const char *host)
{
    ADDRINFOA hints, *info = NULL;
    int error;
    ZeroMemory(&hints, sizeof hints);
    hints.ai_family = family;
    hints.ai_flags = AI_NUMERICHOST;
    error = getaddrinfo(host, NULL, &hints, &info);
    if (error)
        return error;
    CopyMemory(sub->area, info->ai_addr, info->ai_addrlen);
    freeaddrinfo(info);
    return 0;
}

/* Put a numeric address (an IPv6 one perhaps with %scope) into the submission. */
long iocp_set_address(iocp_submission *sub, int family, const char *host, int port, unsigned long flow,
                      unsigned long scope)
{
    SOCKADDR_STORAGE *storage = area_of(sub);
    long error;
    ZeroMemory(storage, sizeof *storage);
    storage->ss_family = (ADDRESS_FAMILY)family;
    if (family == AF_INET6) {
        SOCKADDR_IN6 *six = area_of(sub);
        if (inet_pton(family, host, &six->sin6_addr) != 1 && (error = parse_address(sub, family, host)) != 0)
            return error;
        sub->address_length = sizeof *six;
        six->sin6_port = htons((u_short)port);
        six->sin6_flowinfo = htonl(flow);
        if (scope)
            six->sin6_scope_id = scope;
    } else {
        SOCKADDR_IN *four = area_of(sub);
        if (inet_pton(family, host, &four->sin_addr) != 1 && (error = parse_address(sub, family, host)) != 0)
            return error;
        sub->address_length = sizeof *four;
        four->sin_port = htons((u_short)port);
    }
    return 0;
}

/* Read the address in the submission: its text, and port, flow label and scope.  WSAEAFNOSUPPORT for a family that
 * has other addresses. */
long iocp_get_address(iocp_submission *sub, char *host, unsigned long *numbers)
{
    const SOCKADDR *address = area_of(sub);
    numbers[0] = numbers[1] = numbers[2] = 0;
    if (sub->address_length >= (int)sizeof(SOCKADDR_IN) && address->sa_family == AF_INET) {
        SOCKADDR_IN *four = (SOCKADDR_IN *)address;
        numbers[0] = ntohs(four->sin_port);
        return inet_ntop(AF_INET, &four->sin_addr, host, IOCP_HOST_SIZE) ? 0 : WSAGetLastError();
    }
    if (sub->address_length >= (int)sizeof(SOCKADDR_IN6) && address->sa_family == AF_INET6) {
        SOCKADDR_IN6 *six = (SOCKADDR_IN6 *)address;
        numbers[0] = ntohs(six->sin6_port);
        numbers[1] = ntohl(six->sin6_flowinfo);
        numbers[2] = six->sin6_scope_id;
        return inet_ntop(AF_INET6, &six->sin6_addr, host, IOCP_HOST_SIZE) ? 0 : WSAGetLastError();
    }
    return WSAEAFNOSUPPORT;
}
