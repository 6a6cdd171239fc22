Feature: Nothing is started that can not work
  Before a unit is touched, the machine, its devices and its memory are looked at, and the figures are told.

  @S16
  Scenario: A running hive reports itself and each of its units
    When I run "rbee-ctl hive status --node lab2 --json"
    Then the command ends with 0
    And the report of "lab2" says the target is active, which version it has, and that "rbee-worker@cpu0.service" is active

  @S33 @S36 @P11
  Scenario: Enough memory and the right device
    When I start a worker "cpu0-d" with 1 slot on "lab2"
    Then the command ends with 0
    And standard error says "1.2 x"
    And the worker "lab2-cpu0-d" is idle

  @S34 @P11
  Scenario: Too little memory
    Given "lab2" has only 64 MB of memory available
    When I start a worker "cpu0-e" with 1 slot on "lab2"
    Then the command ends with 5
    And standard error says "INSUFFICIENT_RAM"
    And "lab2" has no unit for "cpu0-e"

  @S38 @S39 @S69 @P11
  Scenario Outline: A device that is not there
    When I run "rbee-ctl worker start --node lab2 --model smollm2-135m-instruct --backend <backend> --device <device>"
    Then the command ends with <code>
    And standard error says "<error>"

    Examples:
      | backend | device | code | error                |
      | cuda    | 0      | 5    | BACKEND_UNAVAILABLE  |
      | metal   | 0      | 5    | BACKEND_UNAVAILABLE  |
      | cpu     | 5      | 5    | DEVICE_OUT_OF_RANGE  |
      | quantum | 0      | 5    | INVALID_BACKEND      |
