// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * A stand-in for the driver's module in a virtual machine: functions of its names and arguments, the thread of its
 * name, and its links in procfs. None of them does anything but be called, on command, with bytes that the test laid
 * out as a driver version does.
 *
 * A command is one write of `struct command` to /proc/driver/nvidia-uvm/test; the write returns when it is done.
 */
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/proc_fs.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "service_thread.h"

/* To branch 555 the service function bore this name, to 560 the link text this form. */
#if DRIVER_BRANCH < 560
#define SERVICE uvm_gpu_service_replayable_faults
#else
#define SERVICE uvm_parent_gpu_service_replayable_faults
#endif
#if DRIVER_BRANCH <= 560
#define LINK_PREFIX "UVM-"
#else
#define LINK_PREFIX ""
#endif

#define DATA_BYTES 72
#define ENTRY_BYTES 128
#define NO_ENTRY 0xffffffffu

enum operation {
	OP_INIT = 1,		/* in the context of the writer */
	OP_DESTROY = 2,		/* in the context of the writer */
	OP_NOTIFY_HERE = 3,	/* in the context of the writer */
	OP_NOTIFY = 4,		/* in the fault-service thread */
	OP_SERVICE = 5,		/* in the fault-service thread */
	OP_SPIN = 6,		/* the fault-service thread runs; returns at once */
	OP_REST = 7,		/* until here; returns when it is about to sleep */
	OP_COUNTERS = 8,	/* in the fault-service thread */
};

/* Mirrored by src/module.rs. */
struct command {
	u32 operation;
	u32 event_id;
	u64 events;
	u64 va_space;
	u32 entry_at;		/* where in `data` the address of `entry` goes, or NO_ENTRY */
	u32 reserved;
	u8 data[DATA_BYTES];
	u8 entry[ENTRY_BYTES];
};

static char *gpu = "";
module_param(gpu, charp, 0444);
MODULE_PARM_DESC(gpu, "UUID of the GPU behind number 1, as GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx");

void uvm_perf_event_notify(void *events, u32 event_id, void *data);
void uvm_perf_init_va_space_events(void *va_space, void *events);
void uvm_perf_destroy_va_space_events(void *events);
void SERVICE(void *gpu);
void access_counters_isr_bottom_half_entry(void *gpu);

/*
 * The empty assembly keeps the compiler from finding that nothing is done; the attribute, from calling one function
 * for another that does the same.
 */
#define PROBED __attribute__((noipa))

PROBED void uvm_perf_event_notify(void *events, u32 event_id, void *data)
{
	asm volatile("" : : "r"(events), "r"(event_id), "r"(data) : "memory");
}

PROBED void uvm_perf_init_va_space_events(void *va_space, void *events)
{
	asm volatile("" : : "r"(va_space), "r"(events) : "memory");
}

PROBED void uvm_perf_destroy_va_space_events(void *events)
{
	asm volatile("" : : "r"(events) : "memory");
}

PROBED void SERVICE(void *gpu)
{
	asm volatile("" : : "r"(gpu) : "memory");
}

PROBED void access_counters_isr_bottom_half_entry(void *gpu)
{
	asm volatile("" : : "r"(gpu) : "memory");
}

static DEFINE_MUTEX(one_at_a_time);
static struct command command;
static bool spinning;
static struct proc_dir_entry *directory;

static void notify(void)
{
	if (command.entry_at <= DATA_BYTES - sizeof(u64)) {
		u64 address = (unsigned long)command.entry;

		memcpy(command.data + command.entry_at, &address, sizeof(address));
	}
	uvm_perf_event_notify((void *)command.events, command.event_id, command.data);
}

static void spin(void)
{
	while (READ_ONCE(spinning)) {
		cpu_relax();
		cond_resched();
	}
}

static void serve_round(void)
{
	SERVICE((void *)command.events);
}

static void serve_counters(void)
{
	access_counters_isr_bottom_half_entry((void *)command.events);
}

static ssize_t obey(struct file *file, const char __user *from, size_t bytes, loff_t *at)
{
	struct command given;
	ssize_t result = bytes;

	if (bytes != sizeof(given))
		return -EINVAL;
	if (copy_from_user(&given, from, sizeof(given)))
		return -EFAULT;
	mutex_lock(&one_at_a_time);
	if (spinning != (given.operation == OP_REST)) {
		result = -EBUSY;
		goto out;
	}
	if (!spinning)
		command = given;
	switch (given.operation) {
	case OP_INIT:
		uvm_perf_init_va_space_events((void *)command.va_space, (void *)command.events);
		break;
	case OP_DESTROY:
		uvm_perf_destroy_va_space_events((void *)command.events);
		break;
	case OP_NOTIFY_HERE:
		notify();
		break;
	case OP_NOTIFY:
		service_begin(notify);
		service_wait();
		break;
	case OP_SERVICE:
		service_begin(serve_round);
		service_wait();
		break;
	case OP_COUNTERS:
		service_begin(serve_counters);
		service_wait();
		break;
	case OP_SPIN:
		WRITE_ONCE(spinning, true);
		service_begin(spin);
		break;
	case OP_REST:
		WRITE_ONCE(spinning, false);
		service_wait();
		break;
	default:
		result = -EINVAL;
	}
out:
	mutex_unlock(&one_at_a_time);
	return result;
}

static const struct proc_ops test_ops = {
	.proc_write = obey,
};

static int __init begin(void)
{
	char link[64];
	struct proc_dir_entry *gpus;
	int failed = service_start();

	if (failed)
		return failed;
	directory = proc_mkdir("driver/nvidia-uvm", NULL);
	gpus = directory ? proc_mkdir("gpus", directory) : NULL;
	snprintf(link, sizeof(link), LINK_PREFIX "%s/0", gpu);
	if (!gpus || !proc_symlink("1", gpus, link) || !proc_create("test", 0200, directory, &test_ops)) {
		proc_remove(directory);
		kthread_stop(service_thread);
		return -ENOMEM;
	}
	return 0;
}

static void __exit end(void)
{
	proc_remove(directory);
	WRITE_ONCE(spinning, false);
	kthread_stop(service_thread);
}

module_init(begin);
module_exit(end);

MODULE_DESCRIPTION("Functions of nvidia-uvm to attach probes to, for the tests of nvshare");
MODULE_VERSION(DRIVER_VERSION);
MODULE_LICENSE("Dual MIT/GPL");
