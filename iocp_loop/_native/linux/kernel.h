/*
 * io_uring as the kernel has it.
 *
 * The kernel's structures and constants are declared here under our own names, so that this builds with any kernel
 * headers, or none.  They are the kernel's binary interface, as the manual pages io_uring_setup(2), io_uring_enter(2),
 * io_uring_register(2), io_uring_register_buf_ring(3), io_uring_setup_buf_ring(3) and io_uring_prep_recv_multishot(3)
 * describe it (https://man7.org/linux/man-pages/man7/io_uring.7.html).
 */
#ifndef IOCP_LOOP_KERNEL_H
#define IOCP_LOOP_KERNEL_H

#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The same numbers on every architecture but Alpha, whose headers have them. */
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#endif
#ifndef SYS_io_uring_enter
#define SYS_io_uring_enter 426
#endif
#ifndef SYS_io_uring_register
#define SYS_io_uring_register 427
#endif

/* A submission.  Names that the manuals use for one operation only stand in the comments. */
struct uring_sqe {
    uint8_t opcode;
    uint8_t flags; /* SQE_* */
    uint16_t ioprio; /* multishot flag of receive */
    int32_t fd;
    uint64_t offset; /* addr2: the length of connect's address */
    uint64_t addr;
    uint32_t len;
    uint32_t op_flags; /* msg_flags, poll32_events, cancel_flags */
    uint64_t user_data;
    uint16_t buffer_group;
    uint16_t personality;
    int32_t file_index;
    uint64_t addr3;
    uint64_t reserved;
};

/* A completion. */
struct uring_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags; /* CQE_*; the upper half is the number of the picked buffer */
};

struct sq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
    uint64_t user_addr;
};

struct cq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
    uint64_t user_addr;
};

struct setup_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
    struct sq_offsets sq_off;
    struct cq_offsets cq_off;
};

/* One entry of a ring of provided buffers; the ring's tail is kept in `tail` of the first. */
struct uring_buffer {
    uint64_t addr;
    uint32_t len;
    uint16_t id;
    uint16_t tail;
};

struct buffer_registration {
    uint64_t ring_addr;
    uint32_t ring_entries;
    uint16_t group;
    uint16_t flags;
    uint64_t reserved[3];
};

struct enter_argument {
    uint64_t sigmask;
    uint32_t sigmask_size;
    uint32_t min_wait_us;
    uint64_t timespec;
};

struct kernel_timespec {
    int64_t seconds;
    int64_t nanoseconds;
};

struct probe_entry {
    uint8_t opcode;
    uint8_t reserved;
    uint16_t flags;
    uint32_t reserved2;
};

#define PROBE_ENTRIES 256

struct probe {
    uint8_t last_opcode;
    uint8_t entries_count;
    uint16_t reserved;
    uint32_t reserved2[3];
    struct probe_entry entries[PROBE_ENTRIES];
};

_Static_assert(sizeof(struct uring_sqe) == 64, "the kernel's size of a submission");
_Static_assert(sizeof(struct uring_cqe) == 16, "the kernel's size of a completion");
_Static_assert(sizeof(struct setup_params) == 120, "the kernel's size of io_uring_params");
_Static_assert(sizeof(struct uring_buffer) == 16, "the kernel's size of io_uring_buf");
_Static_assert(sizeof(struct buffer_registration) == 40, "the kernel's size of io_uring_buf_reg");
_Static_assert(sizeof(struct enter_argument) == 24, "the kernel's size of io_uring_getevents_arg");

enum {
    OP_NOP = 0,
    OP_POLL_ADD = 6,
    OP_ASYNC_CANCEL = 14,
    OP_READ = 22,
    OP_WRITE = 23,
    OP_RECV = 27,
};

/* io_uring_setup(2) */
#define SETUP_CQSIZE (1U << 3)
#define SETUP_CLAMP (1U << 4)
#define SETUP_SUBMIT_ALL (1U << 7)
#define SETUP_TASKRUN_FLAG (1U << 9)
#define SETUP_SINGLE_ISSUER (1U << 12) /* Linux 6.0 */
#define SETUP_DEFER_TASKRUN (1U << 13) /* Linux 6.1 */

#define FEATURE_SINGLE_MMAP (1U << 0)
#define FEATURE_NODROP (1U << 1)
#define FEATURE_RW_CUR_POS (1U << 3)
#define FEATURE_FAST_POLL (1U << 5)
#define FEATURE_EXT_ARG (1U << 8)
#define FEATURE_CQE_SKIP (1U << 11)
#define FEATURES_NEEDED                                                                                               \
    (FEATURE_SINGLE_MMAP | FEATURE_NODROP | FEATURE_RW_CUR_POS | FEATURE_FAST_POLL | FEATURE_EXT_ARG |               \
     FEATURE_CQE_SKIP)

#define MMAP_RINGS 0ULL
#define MMAP_SQES 0x10000000ULL

/* io_uring_enter(2) */
#define ENTER_GETEVENTS (1U << 0)
#define ENTER_EXT_ARG (1U << 3)

#define SQ_CQ_OVERFLOW (1U << 1)
#define SQ_TASKRUN (1U << 2)

#define SQE_BUFFER_SELECT (1U << 5)
#define SQE_CQE_SKIP_SUCCESS (1U << 6)

#define RECV_MULTISHOT (1U << 1)
#define POLL_ADD_MULTI (1U << 0)
#define CANCEL_ALL (1U << 0)
#define CANCEL_ANY (1U << 2)

#define CQE_BUFFER (1U << 0)
#define CQE_MORE (1U << 1)
#define CQE_BUFFER_MORE (1U << 4) /* Linux 6.12 */
#define CQE_BUFFER_SHIFT 16

/* io_uring_register(2) */
#define REGISTER_PROBE 8
#define REGISTER_BUFFER_RING 22
#define BUFFER_RING_INCREMENTAL 2 /* Linux 6.12 */
#define PROBE_SUPPORTED (1U << 0)

static inline int sys_setup(unsigned entries, struct setup_params *params)
{
    return (int)syscall(SYS_io_uring_setup, entries, params);
}

static inline int sys_enter(int fd, unsigned submit, unsigned wait, unsigned flags, void *argument, size_t size)
{
    int count = (int)syscall(SYS_io_uring_enter, fd, submit, wait, flags, argument, size);
    return count < 0 ? -errno : count;
}

static inline int sys_register(int fd, unsigned opcode, void *argument, unsigned count)
{
    return (int)syscall(SYS_io_uring_register, fd, opcode, argument, count);
}

#define LOAD(pointer) __atomic_load_n((pointer), __ATOMIC_ACQUIRE)
#define STORE(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELEASE)

#endif
