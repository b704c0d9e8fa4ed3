/* What Python sees of uring.h: the same declarations, as cffi reads them. */

#define URING_BATCH 1024
#define URING_SHARED 1
#define URING_PLAIN 2
#define URING_MORE 1
#define URING_DATA 2
#define URING_BIG 4
#define URING_SMALL 2048
#define URING_IN_A_ROW 4

typedef struct uring {
    int fd;
    uint64_t token[1024];
    int64_t result[1024];
    int64_t start[1024];
    uint32_t flags[1024];
    char *memory;
    size_t memory_size;
    int incremental;
    int events_hold;
    ...;
} uring;

enum uring_step {
    URING_STEP_SETUP,
    URING_STEP_FEATURES,
    URING_STEP_OPCODES,
    URING_STEP_MEMORY,
    URING_STEP_BUFFERS,
    ...
};

uring *uring_open(int flags, int wake_fd, int epoll_fd, int *step);
void uring_close(uring *ring, int keep_memory);
void uring_abandon(uring *ring);

int uring_wait(uring *ring, int64_t timeout_ns, uint64_t taken);
int uring_submit(uring *ring);
int uring_settle(uring *ring);

int uring_prep_receive_stream(uring *ring, int fd, uint64_t token);
int uring_prep_read(uring *ring, int fd, uint64_t token, void *data, uint32_t size, int64_t offset);
int uring_prep_write(uring *ring, int fd, uint64_t token, const void *data, uint32_t size, int64_t offset);
int uring_cancel(uring *ring, uint64_t token);
int uring_cancel_all(uring *ring);

int64_t uring_cookie(int fd);
