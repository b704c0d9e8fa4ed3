/* What Python sees of iocp.h.  The .c files beside it say what each function does. */

#define IOCP_KEY_WAKE ...
#define IOCP_KEY_SOCKET ...
#define IOCP_KEY_FILE ...
#define IOCP_KEY_POLL ...
#define IOCP_KEY_HANDLE ...
#define IOCP_BATCH_SIZE ...
#define IOCP_GATHER_LIMIT ...
#define IOCP_AREA_SIZE ...
#define IOCP_HOST_SIZE ...
#define IOCP_READABLE ...
#define IOCP_WRITABLE ...
#define IOCP_FAILED ...
#define IOCP_CLOSED ...
#define IOCP_DISK ...
#define IOCP_DEVICE ...
#define IOCP_PIPE ...

typedef struct iocp_submission {
    uintptr_t handle;
    uintptr_t accepted;
    uintptr_t wait;
    uintptr_t event;
    unsigned long bytes;
    int address_length;
    uint64_t area[...];
    ...;
} iocp_submission;

typedef struct iocp_port {
    uintptr_t handle;
    uintptr_t timer;
    long count;
    uintptr_t batch[...];
    ...;
} iocp_port;

long iocp_start(void);
void iocp_set_closing_signal(int number);
void iocp_set_service(int yes);
unsigned long iocp_error_of_status(unsigned long status, int socket);
int iocp_has_wait_packets(void);
long iocp_port_open(iocp_port *port, unsigned long concurrency);
void iocp_port_close(iocp_port *port);
long iocp_wait(iocp_port *port, long long timeout_ns);
long iocp_post(iocp_port *port);

long iocp_associate_socket(iocp_port *port, uintptr_t socket, int *facts);
long iocp_associate_file(iocp_port *port, uintptr_t handle, int *skips);
int iocp_is_synchronous(uintptr_t handle);
long iocp_cancel(iocp_submission *sub);
long iocp_close_socket(uintptr_t socket);
long iocp_close_handle(uintptr_t handle);

long iocp_receive(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size);
long iocp_send(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size);
long iocp_send_gathered(uintptr_t socket, iocp_submission *sub, int count, void **buffers, unsigned long *sizes);
long iocp_receive_from(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size);
long iocp_send_to(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size);
long iocp_accept(uintptr_t listener, iocp_submission *sub, int family, int type, int protocol);
long iocp_accept_finish(uintptr_t listener, iocp_submission *sub);
long iocp_connect(uintptr_t socket, iocp_submission *sub);
long iocp_connect_finish(uintptr_t socket);
long iocp_transmit_file(uintptr_t socket, iocp_submission *sub, uintptr_t file, unsigned long long offset,
                        unsigned long count);

long iocp_set_address(iocp_submission *sub, int family, const char *host, int port, unsigned long flow,
                      unsigned long scope);
long iocp_get_address(iocp_submission *sub, char *host, unsigned long *numbers);

long iocp_read(uintptr_t handle, iocp_submission *sub, void *buffer, unsigned long size, unsigned long long offset);
long iocp_write(uintptr_t handle, iocp_submission *sub, const void *buffer, unsigned long size,
                unsigned long long offset);
long iocp_pipe_serve(const wchar_t *name, int first, unsigned long buffer_size, uintptr_t *handle);
long iocp_pipe_accept(uintptr_t handle, iocp_submission *sub);
long iocp_pipe_connect(const wchar_t *name, uintptr_t *handle);

unsigned long iocp_file_type(uintptr_t handle);
long iocp_read_blocking(uintptr_t handle, void *buffer, unsigned long size, unsigned long *count);
long iocp_write_blocking(uintptr_t handle, const void *buffer, unsigned long size, unsigned long *count);
long iocp_interrupt(unsigned long thread);

long iocp_poll_open(iocp_port *port, uintptr_t *device);
long iocp_base_socket(uintptr_t socket, uintptr_t *base);
long iocp_poll(uintptr_t device, iocp_submission *sub, uintptr_t base, unsigned long events);
unsigned long iocp_polled(iocp_submission *sub);

long iocp_watch_handle(iocp_port *port, iocp_submission *sub, uintptr_t handle);
int iocp_unwatch_handle(iocp_submission *sub);
long iocp_emulate(iocp_submission *sub);
long iocp_emulate_watch(iocp_port *port, iocp_submission *sub, long key);
void iocp_emulate_finish(iocp_submission *sub);
