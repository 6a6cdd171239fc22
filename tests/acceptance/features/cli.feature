Feature: What a person types

  @S88
  Scenario: All workers of both machines are listed
    When I run "rbee-ctl workers list"
    Then the command ends with 0
    And each of these is a line of standard output:
      | lab1-cpu0 | lab1 | smollm2-135m-instruct | cpu:0 | idle |
      | lab2-cpu0 | lab2 | smollm2-135m-instruct | cpu:0 | idle |
