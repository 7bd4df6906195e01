/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* A thread with the name of the fault-service thread of the first GPU. It does what it is given, and sleeps. */
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/sched.h>
#include <linux/wait.h>

static DECLARE_WAIT_QUEUE_HEAD(service_wake);
static DECLARE_COMPLETION(service_done);
static void (*service_work)(void);
static struct task_struct *service_thread;

static int serve(void *unused)
{
	while (!kthread_should_stop()) {
		wait_event_interruptible(service_wake, READ_ONCE(service_work) || kthread_should_stop());
		if (!READ_ONCE(service_work))
			continue;
		service_work();
		WRITE_ONCE(service_work, NULL);
		complete(&service_done);
	}
	return 0;
}

/* Gives the thread work; the caller gives no more before it has waited for that. */
static void service_begin(void (*work)(void))
{
	reinit_completion(&service_done);
	WRITE_ONCE(service_work, work);
	wake_up(&service_wake);
}

static void service_wait(void)
{
	wait_for_completion(&service_done);
}

static int service_start(void)
{
	service_thread = kthread_run(serve, NULL, "UVM GPU%u BH", 1);
	return PTR_ERR_OR_ZERO(service_thread);
}
