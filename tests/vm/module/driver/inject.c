// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Makes the driver's own nvidia-uvm say what it says only with a GPU at work: on command, it calls the driver's
 * functions with events of GPU faults and migrations on real VA spaces.
 *
 * It is compiled against the headers of the driver that it calls, so that the driver's own definitions lay the
 * events out, and none of what the tests should check.
 *
 * A command is one ioctl with a `struct command` on /proc/driver/nvshare-inject; it returns when it is done.
 */
#include "uvm_gpu.h"
#include "uvm_perf_events.h"
#include "uvm_va_space.h"

#include <linux/file.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/proc_fs.h>
#include <linux/uaccess.h>

#include "service_thread.h"

/* In this order in src/driver.rs. */
enum operation {
	OP_FIND = 1,		/* fills in `events` of the VA space behind `descriptor` */
	OP_SERVICE,		/* the fault-service thread begins a round */
	OP_FAULT,		/* the fault-service thread notifies of a GPU fault */
	OP_MIGRATE,		/* the fault-service thread notifies of a migration */
	OP_MIGRATE_HERE,	/* the caller does */
	OP_COUNTERS,		/* the fault-service thread turns to the access counters */
};

/* Mirrored by src/driver.rs. */
struct command {
	u32 operation;
	s32 descriptor;
	u64 events;
	u32 processor;		/* of a fault; the destination of a migration */
	u32 source;
	u32 cause;
	u32 instances;
	u64 bytes;
};

static char *link = "";
module_param(link, charp, 0444);
MODULE_PARM_DESC(link, "what the procfs link of the GPU behind number 1 says");

/* Bytes of the call with which a function begins, and where the probes of others are. */
#define TRACER_CALL 5

static typeof(uvm_perf_event_notify) *event_notify;
static struct proc_dir_entry *gpu_entry, *command_entry;
static DEFINE_MUTEX(one_at_a_time);
static struct command command;

static void *resolve(const char *name)
{
	struct kprobe probe = { .symbol_name = name };

	if (register_kprobe(&probe))
		return NULL;
	unregister_kprobe(&probe);
	return probe.addr;
}

static void nothing(void);
static noinline void nothing(void)
{
	asm volatile("" : : : "memory");
}

/* Behind the place where others' probes are, the service thread here leaves a function: there is no GPU to serve. */
static int leave(struct kprobe *probe, struct pt_regs *regs)
{
	if (current != service_thread)
		return 0;
	regs->ip = (unsigned long)nothing;
	return 1;
}

/* Its presence keeps the kernel from replacing the probe by a jump, which could not leave the function. */
static void after(struct kprobe *probe, struct pt_regs *regs, unsigned long flags)
{
}

static struct kprobe service_probe = { .pre_handler = leave, .post_handler = after };
static struct kprobe counters_probe = { .pre_handler = leave, .post_handler = after };

static int intercept(struct kprobe *probe, u8 *entry)
{
	if (!entry)
		return -ENOENT;
	probe->addr = entry + TRACER_CALL;
	return register_kprobe(probe);
}

static void enter(struct kprobe *probe)
{
	void (*function)(void *) = (void *)(probe->addr - TRACER_CALL);

	function(NULL);
}

static void serve_round(void)
{
	enter(&service_probe);
}

static void serve_counters(void)
{
	enter(&counters_probe);
}

static void notify_fault(void)
{
	uvm_fault_buffer_entry_t entry = { .num_instances = command.instances };
	uvm_perf_event_data_t data = { };

	data.fault.proc_id.val = command.processor;
	data.fault.gpu.buffer_entry = &entry;
	event_notify((void *)command.events, UVM_PERF_EVENT_FAULT, &data);
}

static void notify_migration(void)
{
	uvm_perf_event_data_t data = { };

	data.migration.dst.val = command.processor;
	data.migration.src.val = command.source;
	data.migration.address = 0x7f0000000000;
	data.migration.bytes = command.bytes;
	data.migration.transfer_mode = UVM_VA_BLOCK_TRANSFER_MODE_MOVE;
	data.migration.cause = command.cause;
	event_notify((void *)command.events, UVM_PERF_EVENT_MIGRATION, &data);
}

static long find(void)
{
	struct file *file = fget(command.descriptor);
	unsigned long word = file ? (unsigned long)file->private_data : 0;
	uvm_va_space_t *va_space = (void *)(word & ~UVM_FD_TYPE_MASK);

	if (file)
		fput(file);
	if ((word & UVM_FD_TYPE_MASK) != UVM_FD_VA_SPACE || !va_space)
		return -EBADF;
	command.events = (unsigned long)&va_space->perf_events;
	return 0;
}

static void on_service_thread(void (*work)(void))
{
	service_begin(work);
	service_wait();
}

static long obey(void)
{
	switch (command.operation) {
	case OP_FIND:
		return find();
	case OP_SERVICE:
		on_service_thread(serve_round);
		return 0;
	case OP_COUNTERS:
		on_service_thread(serve_counters);
		return 0;
	case OP_FAULT:
		on_service_thread(notify_fault);
		return 0;
	case OP_MIGRATE:
		on_service_thread(notify_migration);
		return 0;
	case OP_MIGRATE_HERE:
		notify_migration();
		return 0;
	default:
		return -EINVAL;
	}
}

static long given(struct file *file, unsigned int number, unsigned long address)
{
	long result = -EFAULT;

	mutex_lock(&one_at_a_time);
	if (!copy_from_user(&command, (void __user *)address, sizeof(command))) {
		result = obey();
		if (!result && copy_to_user((void __user *)address, &command, sizeof(command)))
			result = -EFAULT;
	}
	mutex_unlock(&one_at_a_time);
	return result;
}

static const struct proc_ops command_ops = {
	.proc_ioctl = given,
};

static void end(void)
{
	proc_remove(command_entry);
	proc_remove(gpu_entry);
	if (!IS_ERR_OR_NULL(service_thread))
		kthread_stop(service_thread);
	unregister_kprobe(&counters_probe);
	unregister_kprobe(&service_probe);
}

static int __init begin(void)
{
	/* To branch 555 the service function bore the second name. */
	u8 *service = resolve("uvm_parent_gpu_service_replayable_faults");
	int failed = intercept(&service_probe, service ?: resolve("uvm_gpu_service_replayable_faults"));

	if (failed)
		return failed;
	failed = intercept(&counters_probe, resolve("access_counters_isr_bottom_half_entry"));
	if (failed) {
		unregister_kprobe(&service_probe);
		return failed;
	}
	event_notify = resolve("uvm_perf_event_notify");
	failed = event_notify ? service_start() : -ENOENT;
	if (!failed) {
		gpu_entry = proc_symlink("driver/nvidia-uvm/gpus/1", NULL, link);
		command_entry = proc_create("driver/nvshare-inject", 0600, NULL, &command_ops);
		failed = gpu_entry && command_entry ? 0 : -ENOMEM;
	}
	if (failed)
		end();
	return failed;
}

module_init(begin);
module_exit(end);

MODULE_DESCRIPTION("Events for nvidia-uvm without a GPU, for the tests of nvshare");
MODULE_LICENSE("Dual MIT/GPL");
