/* Processes that fail as fast as one core can make them, until killed: vfork(2), _exit(1), wait(2). */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	unsigned long count = 0;

	prctl(PR_SET_NAME, argc > 1 ? argv[1] : "cnptest-storm");
	prctl(PR_SET_PDEATHSIG, 9);
	for (;;) {
		pid_t pid = vfork();

		if (pid == 0)
			_exit(1);
		if (pid > 0 && waitpid(pid, NULL, 0) == pid && ++count % 1000 == 0) {
			printf("%lu\n", count);
			fflush(stdout);
		}
	}
}
